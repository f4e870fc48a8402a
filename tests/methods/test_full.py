"""Full fine-tuning: all of the model, with or without the way back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_peft import inject, load_adapter
from lightning_peft.methods import FullFineTuning

Build = Callable[[str], Any]


@pytest.mark.parametrize("name", ["bert", "gpt2", "cnn", "t5"])
def test_trains_every_parameter(name: str, build: Build) -> None:
    example = build(name)
    names = {n for n, _ in example.model.named_parameters()}
    adapter = inject(example.model, FullFineTuning())
    assert set(adapter.named_parameters()) == names
    assert all(p.requires_grad for p in example.model.parameters())


@pytest.mark.parametrize("name", ["bert", "gpt2", "cnn", "t5"])
def test_goes_back_where_the_original_was_kept(name: str, build: Build) -> None:
    example = build(name)
    base, before = example.logits(), example.model.state_dict()
    before = {key: tensor.clone() for key, tensor in before.items()}
    adapter = inject(example.model, FullFineTuning(keep_original=True))
    example.train(adapter.parameters())
    tuned = example.logits()
    assert not torch.allclose(tuned, base)
    with adapter.disabled():
        assert torch.equal(example.logits(), base)
    assert torch.equal(example.logits(), tuned)
    adapter.remove()
    assert all(torch.equal(t, before[k]) for k, t in example.model.state_dict().items())


def test_keeps_no_copy_unless_asked(build: Build) -> None:
    model = build("bert").model
    addresses = {n: p.data_ptr() for n, p in model.named_parameters()}
    inject(model, FullFineTuning())
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == addresses


@pytest.mark.parametrize("name", ["bert", "gpt2", "cnn"])
def test_saved_and_loaded(name: str, build: Build, tmp_path: Path) -> None:
    example, other = build(name), build(name)
    adapter = inject(example.model, FullFineTuning())
    example.model.train()
    example.train(adapter.parameters())
    example.model.eval()
    loaded = load_adapter(other.model, adapter.save(tmp_path))
    assert torch.equal(other.logits(), example.logits())
    assert loaded.methods == (FullFineTuning(),)


def test_leaves_integers_alone() -> None:
    model = torch.nn.Linear(2, 2)
    model.register_parameter("codes", torch.nn.Parameter(torch.ones(2).int(), requires_grad=False))
    assert inject(model, FullFineTuning()).in_place == ["bias", "weight"]
