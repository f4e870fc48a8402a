"""How several processes share the rows of a split."""

import itertools
from collections.abc import Iterator
from typing import Any

from torch import distributed
from torch.utils.data import DataLoader


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


class SharedLoader:
    """This process's batches of rows that several processes evaluate together.

    No `DataLoader`, so that the Trainer takes it as it is and puts no sampler of its own in.

    Args:
        loader: Of all rows, in their order.
        rank: The number of this process.
        processes: How many there are.
    """

    def __init__(self, loader: DataLoader[Any], rank: int, processes: int) -> None:
        dataset: Any = loader.dataset
        batches = shares(len(dataset), loader.batch_size or 1, processes)[rank]
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
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
