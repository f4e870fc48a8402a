"""Training rows that stay on disk or on the hub: read block by block, again in each epoch."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lightning_peft.data.sharing import place
from lightning_peft.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

BLOCK = 8192
"""Rows that are read at once, and among which the order is random."""
_STEP = 1024  # rows that are tokenised at once


class RowStream(IterableDataset[Any]):
    """This process's and worker's share of a stream, in an order that follows from the seed.

    A block is shuffled and shared by all processes alike, so that each gets as many rows of it;
    up to one row less than there are processes is left out. Workers take blocks in turn.

    Args:
        blocks: Reads the rows from the beginning on, without those that cannot be used.
        items: What the model gets of some rows.
        seed: Seed of the order.
        epoch: Its number, from 0.
        rank: The number of this process.
        processes: How many there are.
    """

    def __init__(
        self,
        blocks: Callable[[], Iterable["Dataset"]],
        items: Callable[["Dataset"], Iterable[Any]],
        seed: int,
        epoch: int,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.blocks, self.items, self.seed, self.epoch = blocks, items, seed, epoch
        self.rank, self.processes = rank, processes

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        own, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for number, rows in enumerate(self.blocks()):
            if number % workers != own:
                continue
            seed = 1_000_003 * (1_000_003 * self.seed + self.epoch) + number
            generator = torch.Generator().manual_seed(seed % 2**63)
            order = torch.randperm(len(rows), generator=generator).tolist()
            whole = len(rows) - len(rows) % self.processes
            share = order[self.rank : whole : self.processes]
            for i in range(0, len(share), _STEP):
                yield from self.items(rows.select(share[i : i + _STEP]))


class StreamLoader:
    """Batches of a stream; a fit that is resumed within an epoch goes on behind the last batch.

    Args:
        stream: Makes the stream of an epoch, given its number, this process's and how many
            processes there are.
        progress: Tells the epoch and how many of its batches are done, when one is begun.
        batch_size: Rows in a batch.
        collator: Makes a batch of a list of items.
        num_workers: Processes that load batches.
    """

    def __init__(
        self,
        stream: Callable[[int, int, int], RowStream],
        progress: Callable[[], tuple[int, int]],
        batch_size: int,
        collator: Callable[[Any], Any],
        num_workers: int = 0,
    ) -> None:
        self.stream, self.progress, self.batch_size = stream, progress, batch_size
        self.collator, self.num_workers = collator, num_workers

    def __iter__(self) -> Iterator[Any]:
        epoch, done = self.progress()
        loader: DataLoader[Any] = DataLoader(
            self.stream(epoch, *place()),
            batch_size=self.batch_size,
            collate_fn=self.collator,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )
        for number, batch in enumerate(loader):
            if number >= done:
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the Trainer's own count tells where to go on."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing; that there is this method tells Lightning that a fit can be resumed."""


def progress_of(trainer: Trainer | None) -> tuple[int, int]:
    """Return the epoch, and how many of its batches were trained on before an interruption."""
    if trainer is None:
        return 0, 0
    epochs: Any = trainer.fit_loop.epoch_progress.current
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    between = epochs.processed == epochs.started  # the interruption was between two epochs
    return epochs.processed, 0 if between else batches.processed


def check_streamed(**settings: Any) -> None:
    """Refuse what can only be done with all training rows at hand.

    Raises:
        ConfigError: A setting asks for that.
    """
    for name, value in settings.items():
        if value is not None:
            raise ConfigError(
                f"`{name}` must be left out with `streaming`, which never has all training rows, "
                f"but is {value} instead; `trainer.max_steps` says how many are trained on."
            )
