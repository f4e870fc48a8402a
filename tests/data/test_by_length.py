from collections import Counter
from itertools import pairwise

import torch

from lightning_peft.data.by_length import ByLength, lengths_of

LENGTHS = [
    int(n) for n in torch.randint(3, 90, (1003,), generator=torch.Generator().manual_seed(0))
]


def batches(sampler):
    rows = list(sampler)
    return [rows[i : i + 10] for i in range(0, len(rows), 10)]


def test_every_row_comes_once_in_batches_of_like_lengths():
    found = batches(ByLength(LENGTHS, 10, seed=0))
    assert Counter(row for batch in found for row in batch) == Counter(range(1003))
    padded = sum(max(LENGTHS[row] for row in batch) * len(batch) for batch in found)
    assert padded < 1.05 * sum(LENGTHS)
    assert len(found[-1]) == 3


def test_the_order_follows_the_seed_and_the_epoch_alone():
    one, other = ByLength(LENGTHS, 10, seed=1), ByLength(LENGTHS, 10, seed=1)
    first = list(one)
    torch.rand(1)
    assert list(other) == first
    one.set_epoch(1)
    assert list(one) != first
    one.set_epoch(0)
    assert list(one) == first
    assert list(ByLength(LENGTHS, 10, seed=2)) != first


def test_neighbouring_batches_are_not_of_like_lengths():
    longest = [max(LENGTHS[row] for row in b) for b in batches(ByLength(LENGTHS, 10, seed=0))]
    steps = [abs(a - b) for a, b in pairwise(longest)]
    assert sum(steps) / len(steps) > 10


def test_a_row_of_several_pieces_is_as_long_as_its_longest():
    assert lengths_of([[1, 2, 3], [4]]) == [3, 1]
    assert lengths_of([[[1, 2], [3]], [[4]]]) == [2, 1]
