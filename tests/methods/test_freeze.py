"""Freeze: which layers, and when."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AlbertConfig, AlbertModel

from lightning_peft import Freeze, inject
from lightning_peft.errors import ConfigError, TargetError

Build = Callable[[str], Any]


def roots(adapter: Any, depth: int) -> set[str]:
    return {".".join(name.split(".")[:depth]) for name in adapter.named_parameters()}


@pytest.mark.parametrize(
    ("name", "layers", "depth", "expected"),
    [
        ("bert", 1, 4, {"bert.encoder.layer.1", "bert.pooler.dense", "classifier"}),
        ("roberta", 1, 4, {"roberta.encoder.layer.1", "classifier.dense", "classifier.out_proj"}),
        ("distilbert", 1, 4, {"distilbert.transformer.layer.1", "pre_classifier", "classifier"}),
        ("llama", 1, 3, {"model.layers.1", "model.norm.weight"}),
        ("llama_classifier", 1, 3, {"model.layers.1", "model.norm.weight", "score.weight"}),
        ("gpt2", 1, 3, {"transformer.h.1", "transformer.ln_f"}),
        ("t5", 1, 3, {"decoder.block.1", "decoder.final_layer_norm"}),
        ("vit", 1, 3, {"vit.layers.1", "vit.layernorm", "classifier"}),
        ("tagger", 1, 3, {"encoder.layers.1", "head"}),
    ],
)
def test_trains_the_top_and_what_stands_above(
    name: str, layers: int, depth: int, expected: set[str], build: Build
) -> None:
    adapter = inject(build(name).model, Freeze(layers=layers))
    found = {".".join(n.rpartition(".")[0].split(".")[:depth]) for n in adapter.named_parameters()}
    assert found == {e.removesuffix(".weight") for e in expected}


def test_patterns_alone(build: Build) -> None:
    adapter = inject(build("bert").model, Freeze(layers=0, patterns="*.bias"), head=False)
    assert adapter.in_place
    assert all(name.endswith(".bias") for name in adapter.in_place)


def test_no_layer_trains_the_head_alone(build: Build) -> None:
    adapter = inject(build("bert").model, Freeze(layers=0))
    assert adapter.in_place == ["classifier.bias", "classifier.weight"]


def test_a_schedule_is_declared_at_the_start_and_holds_back_gradients(build: Build) -> None:
    example = build("bert")
    adapter = inject(example.model, Freeze(layers=1, schedule={3: 2}))
    lower = {n for n in adapter.named_parameters() if n.startswith("bert.encoder.layer.0.")}
    assert lower
    assert adapter.start_epochs == dict.fromkeys(lower, 3)
    for epoch in (0, 2, 3):
        example.model.zero_grad()
        example.output().square().sum().backward()
        adapter.hold_back(epoch)
        without = {n for n, p in adapter.named_parameters().items() if p.grad is None}
        assert without == (lower if epoch < 3 else set())


def test_a_schedule_holds_back_a_compiled_layer(build: Build) -> None:
    """`torch.compile(layer)` renames the parameters below it."""
    example = build("bert")
    layers = example.model.bert.encoder.layer
    layers[0] = torch.compile(layers[0], backend="eager")
    adapter = inject(example.model, Freeze(layers=1, schedule={3: 2}))
    example.output().square().sum().backward()
    adapter.hold_back(2)
    assert all(parameter.grad is None for parameter in layers[0].parameters())
    assert all(parameter.grad is not None for parameter in layers[1].parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": -1}, "`layers` must not be negative, but is -1"),
        ({"schedule": {0: 4}}, "`schedule` must map later epochs"),
        ({"schedule": {1: 2}}, "`schedule` must map later epochs to more than 2 layers"),
        ({"schedule": {1: 4, 2: 3}}, "`schedule` must map later epochs"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Freeze(**settings)


@pytest.mark.parametrize("settings", [{"layers": 3}, {"layers": 1, "schedule": {1: 3}}])
def test_more_layers_than_there_are(settings: dict[str, Any], build: Build) -> None:
    model = build("bert").model
    with pytest.raises(TargetError, match=r"`layers` must be at most 2, .* but is 3 instead"):
        inject(model, Freeze(**settings))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("method", [Freeze(), Freeze(layers=1)])
def test_a_model_without_layers_says_so(method: Freeze, build: Build) -> None:
    with pytest.raises(TargetError, match="`layers` must be at most 0"):
        inject(build("mlp").model, method)


def test_the_usual_two_layers_or_as_many_as_there_are(build: Build) -> None:
    assert roots(inject(build("bert").model, Freeze()), 4) >= {
        f"bert.encoder.layer.{i}" for i in (0, 1)
    }
    shared = AlbertModel(
        AlbertConfig(vocab_size=8, embedding_size=8, hidden_size=8, num_attention_heads=2,
                     intermediate_size=8)
    )  # fmt: skip
    assert any("albert_layer_groups.0" in name for name in inject(shared, Freeze()).in_place)


def test_a_frozen_trunk_needs_no_graph(build: Build) -> None:
    example = build("bert")
    inject(example.model, Freeze(layers=1))
    hidden = example.model.bert.encoder.layer[0](torch.randn(1, 4, 32))
    hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    assert not hidden.requires_grad
