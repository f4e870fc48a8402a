"""The same method of peft beside ours, with the same values: outputs, gradients, merged weights."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import Adapter, inject
from lightning_peft.delta import SLOT
from lightning_peft.method import Method

peft = pytest.importorskip("peft", reason="peft is not installed: run `pip install '.[dev]'`")

QUIET = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    # what peft 0.21 asks of transformers 5.23
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
"""Marks of a module that runs peft."""

Rename = Callable[[str], str]
"""How peft calls a tensor of a delta, by our name for it."""


def both(example: Any, method: Method, config: Any, rename: Rename) -> tuple[Adapter, Any, dict]:
    """Return our adapter, peft's model, and the pairs of their trained tensors, equal in value."""
    model = example.model.double()
    example.inputs = {
        key: value.double() if value.is_floating_point() else value
        for key, value in example.inputs.items()
    }
    reference = peft.get_peft_model(copy.deepcopy(model), config).double().eval()
    adapter = inject(model, method, head=False)
    theirs = dict(reference.named_parameters())
    pairs = {}
    for name, parameter in adapter.named_parameters().items():
        host, _, end = name.partition(f".{SLOT}.default_{method.kind}.")
        pairs[name] = parameter, theirs[f"base_model.model.{host}.{rename(end)}"]
    assert {id(p) for _, p in pairs.values()} == {id(p) for p in theirs.values() if p.requires_grad}
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for ours, other in pairs.values():
            ours.add_(torch.randn(ours.shape, generator=generator, dtype=ours.dtype), alpha=0.1)
            other.copy_(ours.view(other.shape))
    return adapter, reference, pairs


def assert_same(
    example: Any, method: Method, config: Any, rename: Rename, tolerance: float = 1e-7
) -> None:
    """Compare outputs and gradients in double precision; then the merged weights."""
    base = example.logits(copy.deepcopy(example.model)).double()
    adapter, reference, pairs = both(example, method, config, rename)
    output, expected = example.output(), example.output(reference)
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    assert not torch.allclose(base, output, rtol=1e-3)
    for each in (output, expected):
        each.square().mean().backward()
    for name, (ours, theirs) in pairs.items():
        assert ours.grad is not None, name
        largest = theirs.grad.abs().max()
        assert largest > 0, name
        assert (ours.grad - theirs.grad.view(ours.shape)).abs().max() <= tolerance * largest, name
    assert_merges_alike(adapter, reference, tolerance)


def assert_merges_alike(adapter: Adapter, reference: nn.Module, tolerance: float = 1e-7) -> None:
    """Compare all weights after both are merged."""
    state, expected = adapter.merge().state_dict(), reference.merge_and_unload().state_dict()
    for key, tensor in state.items():
        torch.testing.assert_close(tensor, expected[key], rtol=tolerance, atol=tolerance)
