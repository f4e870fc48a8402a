"""A linear map of a dropped-out input, which keeps one byte a number for backward.

    y = (x ∘ m) Aᵀ / (1 - p),    m ~ Bernoulli(1 - p)

Composed of two operations it would keep `x ∘ m / (1 - p)` and, on a CPU, the mask as numbers of the
input's own width; here the input, which the host's siblings keep anyway, and the mask as booleans.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_STEPS = 2**16
"""How finely a probability is resolved on a CPU."""


def dropped_linear(x: Tensor, a: Tensor, p: float) -> Tensor:
    """Return `dropout(x) Aᵀ`.

    Args:
        x: `(..., in)`.
        a: `(r, in)`.
        p: probability with which a number of `x` is zeroed; on a CPU one of 65,536 steps.
    """
    if torch.compiler.is_compiling() or x.is_nested:  # a compiler fuses, and keeps a seed
        return F.linear(F.dropout(x, p), a)
    product: Tensor = _DroppedLinear.apply(x, a, p)
    return product


class _DroppedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, p: float) -> Tensor:
        mask, ctx.scale = _mask(x, p)
        ctx.save_for_backward(x, a, mask)
        return F.linear(x * mask, a * ctx.scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, a, mask), g = ctx.saved_tensors, gradients[0] * ctx.scale
        to_x = to_a = None
        if ctx.needs_input_grad[0]:
            to_x = (g @ a.to(g.dtype)).mul_(mask).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dropped = (x * mask).to(g.dtype).flatten(0, -2)
            to_a = (g.flatten(0, -2).mT @ dropped).to(a.dtype)
        return to_x, to_a, None


def _mask(x: Tensor, p: float) -> tuple[Tensor, float]:
    """Return a mask of what is kept, and what makes up for the rest."""
    if x.device.type != "cpu":
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p), 1 / (1 - p)
    # Sixteen random bits a number: four times as fast as drawing each by itself.
    limits, steps = torch.iinfo(torch.int64), min(round(p * _STEPS), _STEPS - 1)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(limits.min, limits.max)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    return bits >= steps - _STEPS // 2, _STEPS / (_STEPS - steps)
