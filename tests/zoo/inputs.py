"""Inputs for a model, told from what its `forward` takes."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.zoo.shrink import LABELS, VOCABULARY, WORDS_FROM

ROWS, LENGTH, IMAGE, EOS = 3, 12, 32, 2
NEED_PIXELS = ("GitForCausalLM",)
"""Models of text that cannot do without an image."""


def inputs_for(head: str, model: Any) -> dict[str, Tensor]:
    """Return a full batch with labels: `(ROWS, LENGTH)` ids, or `(ROWS, 3, side, side)` pixels."""
    generator = torch.Generator().manual_seed(0)
    taken = inspect.signature(model.forward).parameters
    if head == "image classification" and "input_ids" not in taken:
        inputs = _pixels(model.config, taken, generator)
    else:
        inputs = _words(taken, generator)
        if type(model).__name__ in NEED_PIXELS:
            inputs |= _pixels(model.config, taken, generator)
    inputs |= _labels(head, inputs.get("input_ids"), generator)
    return {name: tensor for name, tensor in inputs.items() if name in taken}


def _words(taken: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
    ids = torch.randint(WORDS_FROM, VOCABULARY, (ROWS, LENGTH), generator=generator)
    ids[:, -1] = EOS
    first = torch.zeros_like(ids)
    first[:, 0] = 1
    boxes = torch.randint(0, 8, (ROWS, LENGTH, 4), generator=generator).sort(-1)[0]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "global_attention_mask": first,
        "bbox": boxes,
    }


def padded(inputs: dict[str, Tensor], pad: int) -> dict[str, Tensor] | None:
    """Return the batch with rows of different length, padded on the right; None for images."""
    if "attention_mask" not in inputs:
        return None
    shorter = {key: tensor.clone() for key, tensor in inputs.items()}
    for row, length in enumerate(range(LENGTH, LENGTH - 2 * ROWS, -2)):
        shorter["input_ids"][row, length - 1] = EOS
        shorter["input_ids"][row, length:] = pad
        shorter["attention_mask"][row, length:] = 0
        for key in ("labels",):
            if shorter.get(key, torch.empty(0)).shape == shorter["input_ids"].shape:
                shorter[key][row, length:] = -100
    return shorter


def _labels(head: str, ids: Any, generator: torch.Generator) -> dict[str, Tensor]:
    if head in ("sequence classification", "image classification"):
        return {"labels": torch.randint(LABELS, (ROWS,), generator=generator)}
    if head == "token classification":
        return {"labels": torch.randint(LABELS, ids.shape, generator=generator)}
    if head == "question answering":
        start = torch.randint(0, LENGTH // 4, (ROWS,), generator=generator)
        return {"start_positions": start, "end_positions": start + 2}
    if head == "seq2seq":
        return {"labels": torch.randint(WORDS_FROM, VOCABULARY, ids.shape, generator=generator)}
    return {"labels": ids.clone()}


def _pixels(config: Any, taken: Any, generator: torch.Generator) -> dict[str, Tensor]:
    side = getattr(config, "image_size", IMAGE)
    side = side if isinstance(side, int) else IMAGE
    return {"pixel_values": torch.randn(ROWS, 3, side, side, generator=generator)}
