from collections import Counter

import pytest
import torch

from lightning_peft.data.splits import normalised, sample, stratified_split, unseen
from lightning_peft.errors import ConfigError, DataError

LABELS = [0] * 80 + [1] * 19 + [2] * 2


def test_split_keeps_every_row_once_and_each_label_in_proportion():
    kept, held = stratified_split(LABELS, 0.1, seed=0)
    assert sorted(kept + held) == list(range(len(LABELS)))
    assert Counter(LABELS[i] for i in held) == {0: 8, 1: 2, 2: 1}


def test_split_depends_on_the_seed_alone_and_leaves_the_global_state():
    before = torch.get_rng_state()
    first = stratified_split(LABELS, 0.1, seed=0)
    torch.manual_seed(99)
    assert stratified_split(LABELS, 0.1, seed=0) == first
    assert stratified_split(LABELS, 0.1, seed=1) != first
    torch.set_rng_state(before)
    sample(100, 10, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 200])
def test_a_share_that_is_none_is_refused(fraction):
    with pytest.raises(ConfigError, match=f"`validation` must be .* but is {fraction} instead"):
        stratified_split(LABELS, fraction, seed=0)


def test_a_label_with_one_row_cannot_be_split():
    with pytest.raises(DataError, match="label number 1 has 1"):
        stratified_split([0, 0, 1], 0.5, seed=0)


def test_sample_is_a_subset_in_order():
    assert sample(5, None, seed=0) == sample(5, 7, seed=0) == [0, 1, 2, 3, 4]
    drawn = sample(1000, 10, seed=3)
    assert drawn == sorted(set(drawn))
    assert len(drawn) == 10
    assert drawn != sample(1000, 10, seed=4)


def test_unseen_compares_texts_without_case_and_spaces():
    keys = [normalised(text) for text in ("Good  tea\n", "bad tea", "GOOD TEA")]
    assert unseen(keys, [normalised("good tea")]) == [1]
