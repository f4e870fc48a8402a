"""Batches whose rows have different adapters: as if each row had been run with its own alone.

As in `test_every_method.py` each method runs on one kind of model that rotates; the others are
marked slow.
"""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from lightning_peft import Adapter, BottleneckAdapter, LoRA, inject, mixed, switch
from lightning_peft.config import instantiate
from lightning_peft.errors import TargetError
from lightning_peft.method import Method
from lightning_peft.methods import BitFit, FullFineTuning
from tests.catalogue import METHODS

Build = Callable[[str], Any]
Rows = Sequence[str | None]

KINDS = {"encoder": "bert", "decoder": "llama", "encoder-decoder": "t5", "vision": "vit"}
ROWS: Rows = ("a", None, "b", "a", "b", "b")
NOT_KEPT = ("full",)
"""Methods whose YAML keeps no originals, so that there is no base beside them."""


def cells() -> list[Any]:
    turn = sum(b"mixed")
    return [
        pytest.param(
            path,
            kind,
            id=f"{path.stem}-{kind}",
            marks=() if kind == list(KINDS)[(turn + i) % 4] else pytest.mark.slow,
        )
        for i, path in enumerate(METHODS)
        for kind in KINDS
    ]


def methods_of(path: Path) -> list[Method]:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))["method"]
    found = []
    for spec in config.values():
        kept = {"keep_original": True} if "keep_original" in spec else {}
        found.append(instantiate(spec | kept))
    return found


def filled(example: Any, names: Rows, methods: Any) -> list[Adapter]:
    """Inject an adapter of each name, with values that change the outputs, all trainable."""
    adapters = []
    for i, name in enumerate(names):
        adapter = inject(example.model, methods, str(name))
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.05)
        adapters.append(adapter)
    for adapter in adapters:
        adapter.requires_grad_()
    return adapters


def widened(example: Any, rows: int) -> None:
    """Give the example as many rows, no two alike, and no cache."""
    wide = {}
    for name, x in example.inputs.items():
        many = torch.cat([x] * (-(-rows // len(x))))[:rows].clone()
        if name.endswith("input_ids") or name in ("ids", "source", "target"):
            for i in range(rows):
                many[i] = torch.where(many[i] > 0, (many[i] + 5 * i - 3) % 61 + 3, many[i])
        elif many.is_floating_point():
            many += torch.randn(many.shape, generator=torch.Generator().manual_seed(3)) * 0.3
        wide[name] = many
    example.inputs = wide
    if "use_cache" in inspect.signature(example.model.forward).parameters:
        example.inputs["use_cache"] = False


def one_by_one(example: Any, rows: Rows) -> Tensor:
    """Return the outputs of the rows, each with its adapter alone."""
    outputs = {}
    for name in dict.fromkeys(rows):
        switch(example.model, name or ())
        outputs[name] = example.logits()
    return torch.stack([outputs[name][i] for i, name in enumerate(rows)])


def gradients(adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    return {
        f"{adapter.name}.{n}": p.grad.clone()
        for adapter in adapters
        for n, p in adapter.named_parameters().items()
        if p.grad is not None
    }


def weighted(output: Tensor, rows: slice | Tensor = slice(None)) -> Tensor:
    """Return a loss to which each row adds by itself."""
    weights = torch.randn(output.shape[1:], generator=torch.Generator().manual_seed(5))
    return (output.float() * weights).pow(2)[rows].sum()


def alone(example: Any, rows: Rows, adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """Return the gradients of each adapter when its rows are run by themselves."""
    inputs = dict(example.inputs)
    example.model.zero_grad()
    for adapter in adapters:
        switch(example.model, adapter.name)
        own = torch.tensor([i for i, name in enumerate(rows) if name == adapter.name])
        example.inputs = {n: x[own] if torch.is_tensor(x) else x for n, x in inputs.items()}
        weighted(example.output()).backward()
    example.inputs = inputs
    found = gradients(adapters)
    example.model.zero_grad()
    return found


@pytest.mark.parametrize(("path", "kind"), cells())
def test_each_row_is_as_with_its_adapter_alone(path: Path, kind: str, build: Build) -> None:
    example = build(KINDS[kind])
    widened(example, len(ROWS))
    try:
        adapters = filled(example, "ab", methods_of(path))
    except TargetError as error:
        pytest.skip(str(error))
    expected = one_by_one(example, ROWS)
    wanted = alone(example, ROWS, adapters)
    switch(example.model, "b")
    with mixed(example.model, ROWS):
        found = example.logits()
        weighted(example.output()).backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], one_by_one(example, [None] * len(ROWS))[0], atol=1e-4)
    torch.testing.assert_close(gradients(adapters), wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["gpt2_classifier", "bart", "swin", "resnet", "cnn", "mlp", "tagger"]
)
@pytest.mark.parametrize(
    "method",
    [LoRA(r=2), BottleneckAdapter(size=4), BitFit(), FullFineTuning(keep_original=True)],
    ids=["lora", "bottleneck", "bitfit", "full"],
)
def test_other_models(name: str, method: Method, build: Build) -> None:
    example = build(name)
    widened(example, len(ROWS))
    try:
        adapters = filled(example, "ab", method)
    except TargetError as error:
        pytest.skip(str(error))
    expected, wanted = one_by_one(example, ROWS), alone(example, ROWS, adapters)
    with mixed(example.model, ROWS):
        found = example.logits()
        weighted(example.output()).backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients(adapters), wanted, rtol=1e-3, atol=1e-5)
