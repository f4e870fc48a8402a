"""Masks that say for each query what it sees do what the two-dimensional mask does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_peft import PrefixTuning, PromptTuning, inject

Build = Callable[[str], Any]
METHODS = {"prompt": PromptTuning(tokens=4), "prefix": PrefixTuning(tokens=4)}
FORMS = ["boolean", "additive", "one row"]
SIDES = ["left", "right"]


def model_of(build: Build, name: str, method: str) -> Any:
    model = build(name).model.double()
    model.set_attn_implementation("sdpa")
    adapter = inject(model, METHODS[method], head=False)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(2)
        for parameter in adapter.parameters():
            parameter.normal_(std=0.5)
    return model


def padded(side: str) -> tuple[Tensor, Tensor]:
    ids = torch.arange(5, 19).view(2, 7)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    mask = mask if side == "left" else mask.flip(1)
    return ids * mask, mask


def formed(mask: Tensor, form: str, causal: bool) -> Tensor:
    """Return a mask `(batch, keys)` as one with a row for each query, or with one for all."""
    length = mask.shape[1]
    seen = mask.bool()[:, None, None].expand(-1, 1, 1 if form == "one row" else length, -1)
    seen = seen & torch.ones(length, length, dtype=torch.bool).tril() if causal else seen
    if causal:  # a query of padding sees itself, as transformers has it
        seen = seen | torch.eye(length, dtype=torch.bool)
    if form == "boolean":
        return seen
    return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -1e9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["bert", "distilbert", "t5"])
def test_of_an_encoder(name: str, side: str, form: str, method: str, build: Build) -> None:
    model = model_of(build, name, method)
    ids, mask = padded(side)
    more = {"decoder_input_ids": ids[:, :4] + 1} if name == "t5" else {}
    given = formed(mask, form, causal=False)
    if name == "t5" and form != "one row":
        pytest.skip("its decoder reads the mask too, and has another number of queries")
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, **more).logits
        output = model(input_ids=ids, attention_mask=given, **more).logits
    torch.testing.assert_close(output, expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", FORMS[:2])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_of_a_decoder(name: str, side: str, form: str, method: str, build: Build) -> None:
    model = model_of(build, name, method)
    ids, mask = padded(side)
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, **positions).logits
        output = model(input_ids=ids, attention_mask=formed(mask, form, True), **positions).logits
    torch.testing.assert_close(output[mask == 1], expected[mask == 1], rtol=1e-7, atol=1e-10)
