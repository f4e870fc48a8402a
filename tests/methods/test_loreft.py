"""LoReFT computes what adapters 1.3 computes, keeps R orthonormal, and counts real tokens."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    MobileBertConfig,
    MobileBertForSequenceClassification,
    SqueezeBertConfig,
    SqueezeBertForSequenceClassification,
)

from lightning_peft import inject
from lightning_peft.delta import SLOT
from lightning_peft.errors import AdapterError, ConfigError, TargetError
from lightning_peft.methods.loreft import Edit, LoReFT, positions
from tests.methods.adapters_oracle import IDS, model_of, stored
from tests.oracles.filling import fill
from tests.structure.test_drift import reformer

Build = Callable[[str], Any]

CASES: dict[str, dict[str, Any]] = {
    "bert-loreft": {"prefix": 2, "suffix": 2},
    "bert-loreft-tied": {"prefix": 2, "suffix": 1, "tied": True},
    "llama-loreft": {"prefix": 3, "suffix": 1},
}


def randomise(adapter: Any) -> None:
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.3)


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_those_of_adapters(case: str) -> None:
    expected = stored(case)
    model = model_of(case.partition("-")[0])
    adapter = inject(model, LoReFT(r=3, **CASES[case]), head=False)
    own = {}
    for name, parameter in adapter.named_parameters().items():
        host, _, end = name.partition(f".{SLOT}.default_loreft.")
        unit, _, tensor = end.partition(".")
        index = next(part for part in host.split(".") if part.isdigit())
        short = {"source": "W", "source_bias": "b", "rotation": "R"}[tensor]
        own[f"{index}.{int(unit == 'last')}.{short}"] = parameter
    fill(own)
    with torch.no_grad():
        for name, parameter in own.items():
            if name.endswith("R"):  # the same span by another parametrisation
                parameter.copy_(expected[f"R.{name.removesuffix('.R')}"])

    logits = model(input_ids=IDS).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-7, atol=1e-12)
    logits.square().mean().backward()
    assert {n for n in expected if n.startswith("grad")} == {
        f"grad.{name}" for name in own if not name.endswith("R")
    }
    for name, parameter in own.items():
        assert parameter.grad is not None
        if not name.endswith("R"):
            wanted = expected[f"grad.{name}"]
            assert (parameter.grad - wanted).abs().max() <= 1e-7 * wanted.abs().max(), name
        else:  # BERT's head reads the first place alone, so the last edit at the top is idle
            reached = bool(expected[f"grad.{name.removesuffix('R')}W"].any())
            assert bool(parameter.grad.any()) == reached


def test_an_edit_is_the_formula_and_its_gradient_is_exact() -> None:
    edit = Edit(torch.empty(0, dtype=torch.float64), 6, 2)
    nn.init.normal_(edit.source_bias)
    nn.init.normal_(edit.rotation)
    h = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    r = edit.orthonormal()
    naive = h + (h @ edit.source.T + edit.source_bias - h @ r.T) @ r
    torch.testing.assert_close(edit(h), naive)
    parameters = tuple(edit.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: edit(x), (h, *parameters))


def test_the_rotation_stays_orthonormal_while_it_is_trained(build: Build) -> None:
    example = build("bert")
    adapter = inject(example.model, LoReFT())
    edits = [delta.edit for _, _, delta in adapter.deltas]
    before = [edit.orthonormal().detach() for edit in edits]
    example.train(adapter.parameters(), steps=20)
    for edit, old in zip(edits, before, strict=True):
        r = edit.orthonormal()
        torch.testing.assert_close(r @ r.T, torch.eye(4), atol=1e-5, rtol=0)
        assert not torch.allclose(r, old, atol=1e-2)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_padding_does_not_count(name: str, implementation: str, side: str, build: Build) -> None:
    example = build(name)
    example.model.set_attn_implementation(implementation)
    randomise(inject(example.model, LoReFT(prefix=2, suffix=1), head=False))
    ids = torch.arange(3, 8)[None]
    mask = torch.ones_like(ids)
    pad = (2, 0) if side == "left" else (0, 2)
    padded = {
        "input_ids": nn.functional.pad(ids, pad),
        "attention_mask": nn.functional.pad(mask, pad),
        "position_ids": nn.functional.pad(torch.arange(5)[None], pad),
    }
    if name == "bert":
        # its head reads the first place, so compare what stands behind the last layer
        core = example.model.bert
        alone = core(input_ids=ids).last_hidden_state
        beside = core(**padded).last_hidden_state
    else:
        alone, beside = example.model(input_ids=ids)[0], example.model(**padded)[0]
    kept = beside[:, 2:] if side == "left" else beside[:, :5]
    torch.testing.assert_close(kept, alone, rtol=1e-4, atol=1e-5)


def test_first_positions_are_edited_once_in_generation(build: Build) -> None:
    for name in ("llama", "gpt2", "t5"):
        example = build(name)
        adapter = inject(example.model, LoReFT(prefix=2), head=False)
        randomise(adapter)
        inputs = {k: v for k, v in example.inputs.items() if k != "decoder_input_ids"}
        settings = {"max_new_tokens": 5, "do_sample": False}
        cached = example.model.generate(**inputs, **settings)
        assert torch.equal(cached, example.model.generate(**inputs, use_cache=False, **settings))


def test_positions_by_hand() -> None:
    cpu = torch.device("cpu")
    start, end = positions(3, cpu, None, None)
    assert start.tolist() == [[0, 1, 2]]
    assert end.tolist() == [[2, 1, 0]]
    start, end = positions(4, cpu, torch.tensor([[0, 1, 1, 0]]), None)
    assert start.tolist()[0][1:3] == [0, 1]
    assert end.tolist()[0][1:3] == [1, 0]
    assert min(start[0, 0], start[0, 3], end[0, 0], end[0, 3]) > 1000
    seen = torch.tensor([[[[False, True, True, True]]]])
    assert positions(1, cpu, seen, None)[0].tolist() == [[2]]


@pytest.mark.parametrize("name", ["vit", "swin", "resnet", "cnn", "tagger"])
def test_edits_every_position_of_any_layer(name: str, build: Build) -> None:
    example = build(name)
    example.model.train()
    base = example.logits()
    adapter = inject(example.model, LoReFT(), head=False)
    randomise(adapter)
    assert not torch.allclose(example.logits(), base)


def test_channels_are_told_from_a_grid_of_as_many_places() -> None:
    """ConvNeXt's states are (batch, width, height, width of the grid), here 8 of each."""
    config = ConvNextConfig(
        num_channels=3, patch_size=2, depths=[1], hidden_sizes=[8], num_stages=1, num_labels=2
    )
    model = ConvNextForImageClassification(config).eval()
    adapter = inject(model, LoReFT(), head=False)
    randomise(adapter)
    [(_, host, delta)] = adapter.deltas
    kept: list[torch.Tensor] = []
    host.register_forward_hook(lambda *seen: kept.append(seen[2]))
    pixels = torch.randn(1, 3, 16, 16)
    model(pixels)
    with adapter.disabled():
        model(pixels)
    edited, h = kept
    expected = delta.edit(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(edited, expected)


TINY: dict[str, Any] = {
    "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 20,
    "max_position_embeddings": 16,
}  # fmt: skip


def mobile_bert() -> nn.Module:
    """Nearly all of whose layers lies behind a bottleneck from 12 to 8."""
    return MobileBertForSequenceClassification(
        MobileBertConfig(hidden_size=12, embedding_size=8, intra_bottleneck_size=8, **TINY)
    )


def squeeze_bert() -> nn.Module:
    """Whose encoder calls `layer.forward` by its name, past hooks."""
    return SqueezeBertForSequenceClassification(
        SqueezeBertConfig(hidden_size=8, embedding_size=8, **TINY)
    )


@pytest.mark.parametrize("make", [mobile_bert, squeeze_bert])
def test_layers_with_peculiar_ways_are_edited(make: Callable[[], Any]) -> None:
    model = make().train()
    adapter = inject(model, LoReFT(), head=False)
    model(input_ids=torch.arange(3, 8)[None]).logits.sum().backward()
    assert len(adapter.deltas) == 2
    first = {n: p.grad for n, p in adapter.named_parameters().items() if "0" in n.split(".")}
    assert first
    for name, gradient in first.items():
        assert gradient is not None, name
        assert gradient.any(), name


def test_layers_choose(build: Build) -> None:
    adapter = inject(build("bert").model, LoReFT(layers=[-1]), head=False)
    assert [name for name, _, _ in adapter.deltas] == ["bert.encoder.layer.1"]


def test_refusals(build: Build) -> None:
    with pytest.raises(TargetError, match="no stack of layers"):
        inject(build("mlp").model, LoReFT())
    with pytest.raises(TargetError, match="ReformerEncoder runs its layers backwards by itself"):
        inject(reformer(), LoReFT())
    with pytest.raises(TargetError, match="`layers` must lie in"):
        inject(build("bert").model, LoReFT(layers=[2]))
    example = build("resnet")
    inject(example.model, LoReFT(prefix=1))
    with pytest.raises(AdapterError, match="`prefix` must be None"):
        example.logits()
    for settings, message in (
        ({"r": 0}, "`r` must be at least 1"),
        ({"prefix": -1}, "must not be negative"),
        ({"suffix": 1}, "`suffix` must be 0"),
        ({"prefix": 0}, "`prefix` or `suffix` must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            LoReFT(**settings)
