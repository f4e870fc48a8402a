"""Inputs for a model, told from what its `forward` takes."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.shrink import LABELS, VOCABULARY, WORDS_FROM

ROWS, LENGTH, IMAGE, EOS = 3, 12, 32, 2


def inputs_for(head: str, model: nn.Module) -> dict[str, Tensor]:
    """Return a full batch with labels: `(ROWS, LENGTH)` ids, or `(ROWS, 3, IMAGE, IMAGE)`."""
    generator = torch.Generator().manual_seed(0)
    taken = inspect.signature(model.forward).parameters
    if head == "image classification":
        inputs = _pixels(model, generator)
        return inputs | {"labels": torch.randint(LABELS, (ROWS,), generator=generator)}
    ids = torch.randint(WORDS_FROM, VOCABULARY, (ROWS, LENGTH), generator=generator)
    ids[:, -1] = EOS
    inputs = {"input_ids": ids}
    if "attention_mask" in taken:
        inputs["attention_mask"] = torch.ones_like(ids)
    if "bbox" in taken:
        inputs["bbox"] = torch.randint(0, 8, (ROWS, LENGTH, 4), generator=generator).sort(-1)[0]
    return inputs | _labels(head, ids, generator)


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


def _labels(head: str, ids: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    if head == "sequence classification":
        return {"labels": torch.randint(LABELS, (ROWS,), generator=generator)}
    if head == "token classification":
        return {"labels": torch.randint(LABELS, ids.shape, generator=generator)}
    if head == "question answering":
        start = torch.randint(0, LENGTH // 4, (ROWS,), generator=generator)
        return {"start_positions": start, "end_positions": start + 2}
    if head == "seq2seq":
        return {"labels": torch.randint(WORDS_FROM, VOCABULARY, ids.shape, generator=generator)}
    return {"labels": ids.clone()}


def _pixels(model: Any, generator: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(ROWS, 3, IMAGE, IMAGE, generator=generator)}
