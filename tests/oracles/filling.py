"""Weights that two programs can agree on without exchanging them."""

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor


def fill(named: Mapping[str, Tensor], scale: float = 0.3) -> None:
    """Overwrite each tensor by values that follow from its name and shape alone."""
    with torch.no_grad():
        for name, tensor in named.items():
            tensor.copy_(values(name, tensor.shape, scale))


def values(name: str, shape: torch.Size, scale: float) -> Tensor:
    """Return values between -scale and scale; norms get them around 1."""
    phase = zlib.crc32(name.encode()) % 1000
    steps = torch.arange(shape.numel(), dtype=torch.float64)
    wave = scale * torch.sin(steps * 1.7 + phase).reshape(shape)
    return 1 + wave if "norm" in name.lower() and name.endswith("weight") else wave
