"""Batches of like lengths, which have little padding to compute."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

_BATCHES = (
    50  # batches among whose rows like lengths are sought: enough, and the order stays random
)


def lengths_of(items: Sequence[Sequence[Any]]) -> list[int]:
    """Return the number of tokens of each row; a row of several pieces counts its longest."""
    return [max(map(len, i)) if len(i) and isinstance(i[0], list) else len(i) for i in items]


class ByLength(Sampler[int]):
    """Row numbers in a random order in which each batch has rows of like lengths.

    The order follows from `seed` and the epoch, which the Trainer tells, so that a resumed run and
    every process of a run have the same one.

    Args:
        lengths: Of each row.
        batch_size: Rows in a batch.
        seed: Seed of the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Take the number of the epoch that begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        size = _BATCHES * self.batch_size
        chunks = (order[i : i + size] for i in range(0, len(order), size))
        sorted_rows = [row for chunk in chunks for row in sorted(chunk, key=self._longest_first)]
        batches = [
            sorted_rows[i : i + self.batch_size]
            for i in range(0, len(sorted_rows), self.batch_size)
        ]
        # A batch that is not full stays last, else all behind it would be cut elsewhere.
        full = len(batches) - (len(batches[-1]) < self.batch_size) if batches else 0
        for i in [*torch.randperm(full, generator=generator).tolist(), *range(full, len(batches))]:
            yield from batches[i]

    def _longest_first(self, row: int) -> int:
        return -self.lengths[row]
