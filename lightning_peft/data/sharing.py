"""How several processes share the rows of a split."""

import itertools
import math
from collections.abc import Iterator
from typing import Any, cast

from torch import distributed
from torch.utils.data import BatchSampler, DataLoader, Sampler


def place() -> tuple[int, int]:
    """Return this process's number among those that train together, and how many they are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def shares(rows: int, batch_size: int, processes: int) -> list[list[list[int]]]:
    """Divide row numbers among processes: each row once, and as many batches for each process.

    Lightning's own sampler repeats rows until all processes have as many, which a metric counts
    twice. Here batches differ in size by one at most. Only where there are fewer rows than
    batches, some of them are repeated, since a process without a batch would leave others waiting.

    Args:
        rows: How many there are, at least 1.
        batch_size: Rows in a batch at most.
        processes: How many.

    Returns:
        The batches of each process, as row numbers.
    """
    each = -(-rows // (batch_size * processes))  # batches of a process
    count = each * processes
    bounds = [i * rows // count for i in range(count + 1)]
    batches = [list(range(a, b)) or [a % rows] for a, b in itertools.pairwise(bounds)]
    return [batches[process::processes] for process in range(processes)]


class SharedBatches:
    """This process's batches of an order that all processes have alike.

    Lightning's own sampler deals out rows, and shuffles them, which would tear apart what an order
    puts together in a batch. Where batches do not divide evenly the first ones come again.

    Args:
        sampler: The order of all rows.
        batch_size: Rows in a batch.
        rank: The number of this process.
        processes: How many there are.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, rank: int, processes: int) -> None:
        self.sampler = sampler  # where Lightning looks for what is to be told the epoch
        self.whole = BatchSampler(sampler, batch_size, drop_last=False)
        self.rank, self.processes = rank, processes

    def __len__(self) -> int:
        return math.ceil(len(self.whole) / self.processes)

    def __iter__(self) -> Iterator[list[int]]:
        batches = itertools.cycle(self.whole)
        own = itertools.islice(batches, self.rank, None, self.processes)
        yield from itertools.islice(own, len(self))


class SharedLoader:
    """A loader of this process's batches alone.

    No `DataLoader`, so that the Trainer takes it as it is and puts no sampler of its own in.

    Args:
        loader: Of all rows.
        batches: This process's, as row numbers.
    """

    def __init__(self, loader: DataLoader[Any], batches: Any) -> None:
        self.batch_sampler = batches
        self._loader: DataLoader[Any] = DataLoader(
            dataset=loader.dataset,
            batch_sampler=batches,
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            persistent_workers=loader.num_workers > 0,
            pin_memory=loader.pin_memory,
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)


def shared_order(loader: DataLoader[Any]) -> Any:
    """Return a loader by which each of several processes trains on batches of the same order."""
    rank, processes = place()
    if processes == 1:
        return loader
    size = loader.batch_size or 1
    return SharedLoader(loader, SharedBatches(cast(Any, loader.sampler), size, rank, processes))


def shared_rows(loader: DataLoader[Any]) -> Any:
    """Return a loader by which several processes judge each row once."""
    rank, processes = place()
    if processes == 1:
        return loader
    dataset: Any = loader.dataset
    return SharedLoader(loader, shares(len(dataset), loader.batch_size or 1, processes)[rank])
