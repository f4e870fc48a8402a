"""The fingerprint of a frozen base: the same for the same base, another for another."""

import copy
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import LoRA, inject
from lightning_peft.errors import CheckpointError
from lightning_peft.fingerprint import check_fingerprint, fingerprint

Build = Callable[[str], Any]


@pytest.mark.parametrize("name", ["bert", "gpt2", "cnn", "t5"])
def test_stays_the_same_through_injection_and_training(name: str, build: Build) -> None:
    example = build(name)
    adapter = inject(example.model, LoRA(r=2))
    bare = fingerprint(build(name).model, adapter.state_dict())
    assert adapter.base_fingerprint == bare
    example.model.train()
    example.train(adapter.parameters())
    assert fingerprint(example.model, adapter.state_dict()) == bare
    assert bare["tensors"] > 10


def test_is_of_plain_values() -> None:
    found = fingerprint(nn.Linear(2, 2))
    assert {key: type(value) for key, value in found.items()} == {
        "algorithm": str,
        "sha256": str,
        "tensors": int,
    }


def test_survives_casts_copies_and_compilation(build: Build) -> None:
    model = build("bert").model
    before = fingerprint(model)
    assert fingerprint(copy.deepcopy(model).to(torch.bfloat16)) == before
    assert fingerprint(torch.compile(model, backend="eager")) == before
    assert fingerprint(model.double()) == before


def changes(model: nn.Module) -> dict[str, Callable[[], Any]]:
    weight = model.classifier.weight

    def negative_zero() -> None:
        weight.data[0, 0] = -0.0

    return {
        "a value": lambda: weight.data[0, 0].add_(1.0),
        "the sign of zero": negative_zero,
        "a shape": lambda: setattr(weight, "data", weight.data.T.contiguous()),
        "a name": lambda: model.add_module("other", model._modules.pop("classifier")),
        "one more": lambda: model.register_buffer("more", torch.ones(1)),
        "one less": lambda: model._modules.pop("classifier"),
    }


@pytest.mark.parametrize(
    "change", ["a value", "the sign of zero", "a shape", "a name", "one more", "one less"]
)
def test_notices(change: str, build: Build) -> None:
    model = build("bert").model
    model.classifier.weight.data[0, 0] = 0.0
    before = fingerprint(model)
    changes(model)[change]()
    with pytest.raises(CheckpointError, match="`a file` was trained on another base"):
        check_fingerprint(before, fingerprint(model), "`a file`")


def test_excluded_tensors_do_not_count_under_any_name(build: Build) -> None:
    model = build("gpt2").model
    before = fingerprint(model, {"transformer.wte.weight"})
    model.lm_head.weight.data.add_(1.0)
    assert fingerprint(model, {"transformer.wte.weight"}) == before


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(0),
        torch.tensor(1.0),
        torch.tensor([True, False]),
        torch.arange(1000),
        torch.full((3,), torch.nan),
        torch.randn(7, 5).T,
        torch.randn(3, dtype=torch.complex64),
        torch.ones(4, dtype=torch.float8_e4m3fn),
        torch.randn(3).half(),
        torch.empty(5, device="meta"),
    ],
)
def test_takes_tensors_of_any_kind(tensor: torch.Tensor) -> None:
    model = nn.Module()
    model.register_buffer("it", tensor)
    found = fingerprint(model)
    assert found == fingerprint(copy.deepcopy(model))
    assert found["tensors"] == 1


def test_a_large_tensor_is_sampled_at_both_ends() -> None:
    model = nn.Module()
    model.register_buffer("it", torch.zeros(1_000_003))
    seen = {fingerprint(model)["sha256"]}
    for place in (0, 1_000_002):
        model.it.zero_()[place] = 1.0
        seen.add(fingerprint(model)["sha256"])
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("name", "value"), [("layer_norm_eps", 1e-3), ("hidden_act", "relu"), ("is_decoder", True)]
)
def test_notices_a_setting(name: str, value: Any, build: Build) -> None:
    model = build("bert").model
    before = fingerprint(model)
    old = getattr(model.config, name)
    setattr(model.config, name, value)
    message = re.escape(f"`{name}` in the model's configuration was {old!r} and is {value!r} here")
    with pytest.raises(CheckpointError, match=f"frozen tensors are those.*{message}"):
        check_fingerprint(before, fingerprint(model), "`a file`")


def test_notices_a_setting_within_another(build: Build) -> None:
    model = build("llama").model
    before = fingerprint(model)
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 5e5}
    with pytest.raises(CheckpointError, match=r"`rope_parameters\.rope_theta`"):
        check_fingerprint(before, fingerprint(model), "`a file`")


def test_a_base_that_was_loaded_otherwise_is_the_same(build: Build, tmp_path: Path) -> None:
    import transformers

    build("bert").model.save_pretrained(tmp_path)
    cls = transformers.BertForTokenClassification
    load = functools.partial(cls.from_pretrained, tmp_path, ignore_mismatched_sizes=True)
    head = {"classifier.weight", "classifier.bias"}
    one = fingerprint(load(num_labels=2), head)
    other = load(num_labels=3, dtype=torch.bfloat16)
    other.config.update(
        {"use_cache": False, "output_hidden_states": True, "hidden_dropout_prob": 0.3}
    )
    other.config.quantization_config = {"quant_method": "bitsandbytes"}
    check_fingerprint(one, fingerprint(other, head), "`a file`")


def test_a_file_without_settings_is_compared_by_its_tensors(build: Build) -> None:
    model = build("bert").model
    before = fingerprint(model)
    del before["configuration"]
    model.config.layer_norm_eps = 1e-3
    check_fingerprint(before, fingerprint(model), "`an older file`")
