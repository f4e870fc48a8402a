"""Inputs for a model, told from what its `forward` takes."""

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from tests.zoo.shrink import LABELS, VOCABULARY, WORDS_FROM

ROWS, LENGTH, IMAGE, EOS = 3, 12, 32, 2
NEED_PIXELS = ("GitForCausalLM",)
"""Models of text that cannot do without an image."""
BY_CODEBOOK = ("musicgen_decoder", "musicgen_melody_decoder")
"""Kinds of models with one label for each codebook of music."""
UNLABELLED = ("ShieldGemma2ForImageClassification",)
"""Models whose labels are another head's."""


def inputs_for(head: str, model: Any) -> dict[str, Tensor]:
    """Return a full batch with labels: `(ROWS, LENGTH)` ids, or `(ROWS, 3, side, side)` pixels."""
    generator = torch.Generator().manual_seed(0)
    taken = inspect.signature(model.forward).parameters
    if "input_ids" in taken:
        inputs = _words(generator)
        if type(model).__name__ in NEED_PIXELS:
            inputs |= _pixels(model.config, generator)
        if "visual_feats" in taken:
            inputs |= _regions(model.config, generator)
        if "encoder_inputs_embeds" in taken:
            inputs |= _audio(model.config, generator)
    elif "spatial_shapes" in taken:
        inputs = _patches(model.config.vision_config, generator)
    else:
        inputs = _pixels(model.config, generator)
    if type(model).__name__ not in UNLABELLED:
        inputs |= _labels(head, model.config, inputs.get("input_ids"), generator)
    return {name: tensor for name, tensor in inputs.items() if name in taken}


def _words(generator: torch.Generator) -> dict[str, Tensor]:
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


def _labels(head: str, config: Any, ids: Any, generator: torch.Generator) -> dict[str, Tensor]:
    if hasattr(config, "num_qa_labels"):  # visual question answering chooses among answers
        return {"labels": torch.randint(config.num_qa_labels, (ROWS,), generator=generator)}
    if head in ("sequence classification", "image classification"):
        return {"labels": torch.randint(LABELS, (ROWS,), generator=generator)}
    if head == "token classification":
        return {"labels": torch.randint(LABELS, ids.shape, generator=generator)}
    if head == "question answering":
        start = torch.randint(0, LENGTH // 4, (ROWS,), generator=generator)
        return {"start_positions": start, "end_positions": start + 2}
    if head == "seq2seq":
        return {"labels": torch.randint(WORDS_FROM, VOCABULARY, ids.shape, generator=generator)}
    return {"labels": ids.unsqueeze(-1) if config.model_type in BY_CODEBOOK else ids.clone()}


def _pixels(config: Any, generator: torch.Generator) -> dict[str, Tensor]:
    side = getattr(config, "image_size", IMAGE)
    side = side if isinstance(side, int) else IMAGE
    return {"pixel_values": torch.randn(ROWS, 3, side, side, generator=generator)}


def _patches(config: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """Return flattened patches in a square, `(ROWS, patches, channels · patch²)`."""
    count, size = config.num_patches, config.num_channels * config.patch_size**2
    shape = torch.full((ROWS, 2), math.isqrt(count))
    return {
        "pixel_values": torch.randn(ROWS, count, size, generator=generator),
        "pixel_attention_mask": torch.ones(ROWS, count, dtype=torch.long),
        "spatial_shapes": shape,
    }


def _regions(config: Any, generator: torch.Generator) -> dict[str, Tensor]:
    features = torch.randn(ROWS, 5, config.visual_feat_dim, generator=generator)
    return {"visual_feats": features, "visual_pos": torch.rand(ROWS, 5, 4, generator=generator)}


def _audio(config: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """Return embedded audio, as many frames as `LENGTH` tokens of text need."""
    frames, width = LENGTH * config.downsample_factor, config.audio_config.hidden_size
    return {"encoder_inputs_embeds": torch.randn(ROWS, frames, width, generator=generator)}
