"""How much of an adapter is applied, for every method: nothing, all, and between."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_peft import LoRA, PrefixTuning, PromptTuning, inject
from lightning_peft.carrying.switching import mixed, switch
from lightning_peft.config import instantiate
from lightning_peft.delta import NotMergeable
from lightning_peft.errors import AdapterError
from lightning_peft.method import Method
from lightning_peft.methods import BOFT, IA3, BitFit, DoRA, TrainableTokens
from tests.catalogue import METHODS

Build = Callable[[str], Any]


def method_of(path: Path) -> list[Method]:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))["method"]
    return [instantiate(spec) for spec in config.values()]


def scalable(methods: list[Method], model: Any) -> bool:
    deltas = [d for m in methods for d in m.deltas(model).values()]
    return all(d.scalable for d in deltas) and not any(m.in_place(model) for m in methods)


def trained(example: Any, methods: Any, name: str = "default") -> Any:
    adapter = inject(example.model, methods, name, head=False)
    example.model.train()
    example.train(adapter.parameters())
    example.model.eval()
    return adapter


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_nothing_all_and_between(path: Path, build: Build) -> None:
    example, methods = build("bert"), method_of(path)
    base = example.logits()
    if not scalable(methods, copy.deepcopy(example.model)):
        adapter = inject(example.model, methods, head=False)
        with pytest.raises(AdapterError, match="`scale` must stay 1"):
            adapter.scale = 0.5
        return
    adapter = trained(example, methods)
    tuned = example.logits()
    adapter.scale = 0
    assert torch.equal(example.logits(), base)
    adapter.scale = 0.5
    half = example.logits()
    assert min((half - base).abs().max(), (half - tuned).abs().max()) > 0
    adapter.scale = 1
    assert torch.equal(example.logits(), tuned)


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_scaled_change_merges_as_it_is(path: Path, build: Build) -> None:
    example, methods = build("gpt2"), method_of(path)
    example.model.double()
    if not scalable(methods, copy.deepcopy(example.model)):
        pytest.skip("not scalable")
    adapter = trained(example, methods)
    adapter.scale = 0.4
    expected = example.logits()
    try:
        adapter.merge()
    except NotMergeable:
        assert torch.equal(example.logits(), expected)
        return
    torch.testing.assert_close(example.logits(), expected, rtol=1e-9, atol=1e-9)


def test_a_weight_changes_in_proportion(build: Build) -> None:
    example = build("llama")
    adapter = trained(example, LoRA(targets=["q_proj"]))
    weight = example.model.get_parameter("model.layers.0.self_attn.q_proj.weight")
    before = weight.data.clone()
    other = copy.deepcopy(example.model)
    adapter.merge()
    whole = weight.data - before
    for scale in (-1.0, 0.0, 2.5):
        model = copy.deepcopy(other)
        again = model.__dict__["_adapters"]["default"]
        again.scale = scale
        again.merge()
        merged = model.get_parameter("model.layers.0.self_attn.q_proj.weight")
        torch.testing.assert_close(merged.data - before, scale * whole, rtol=0, atol=1e-6)
    assert torch.equal(model.get_parameter("lm_head.weight"), example.model.lm_head.weight)


def test_a_setting_of_the_running_model(build: Build, tmp_path: Path) -> None:
    example = build("bert")
    adapter = trained(example, LoRA())
    state = {k: t.clone() for k, t in adapter.state_dict().items()}
    adapter.scale = 0.3
    assert adapter.scale == 0.3
    assert copy.deepcopy(example.model).__dict__["_adapters"]["default"].scale == 0.3
    assert all(torch.equal(t, state[k]) for k, t in adapter.state_dict().items())


def test_a_tied_head_keeps_its_logits(build: Build) -> None:
    example = build("gpt2")
    base = example.logits()
    adapter = trained(example, TrainableTokens(token_ids=[5, 9]))
    tuned = example.logits()
    adapter.scale = 0.5
    half = example.logits()
    assert not torch.equal(half, base)
    assert not torch.equal(half, tuned)
    assert torch.equal(example.logits(), half)


@pytest.mark.parametrize("method", [LoRA(), DoRA(), IA3(), PrefixTuning(tokens=2)])
def test_each_row_of_a_mixed_batch_has_its_scale(method: Method, build: Build) -> None:
    example = build("bert")
    for scale, name in ((0.5, "a"), (1.0, "b"), (0.0, "c")):
        trained(example, method, name).scale = scale
    alone = []
    for name in "abc":
        switch(example.model, name)
        alone.append(example.logits())
    with mixed(example.model, ["a", "b", "c"]):
        together = example.logits()
    for row, expected in enumerate(alone):
        torch.testing.assert_close(together[row], expected[row], rtol=1e-5, atol=1e-5)


def test_refusals(build: Build) -> None:
    example = build("bert")
    adapter = inject(example.model, LoRA(), head=False)
    for value in (float("nan"), float("inf")):
        with pytest.raises(AdapterError, match="`scale` must be a finite number"):
            adapter.scale = value
    adapter.remove()
    with pytest.raises(AdapterError, match=r"combine\(model, \{'default': scale\}\)"):
        inject(example.model, BitFit(), head=False).scale = 0.5
    with pytest.raises(AdapterError, match="virtual tokens"):
        inject(build("bert").model, PromptTuning(), head=False).scale = 0.5
    example = build("bert")
    adapter = trained(example, BOFT())
    adapter.scale = 0.5
    with pytest.raises(NotMergeable, match="`scale` to 1"):
        adapter.merge()
