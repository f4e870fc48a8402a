"""The low-rank product that LoRA adds to an output."""

import torch
import torch.nn.functional as F
from torch import Tensor


def add_low_rank(output: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return `output + scale · (x Aᵀ) Bᵀ` without a temporary as large as `output`.

    The small matrices are cast to the activations' dtype, never the activations to theirs: so the
    backward pass keeps `x` itself, which the host's siblings share, and `x Aᵀ`.

    Args:
        output: what the host computed, `(..., out)`.
        x: what the host received, `(..., in)`.
        a: `(r, in)`.
        b: `(out, r)`.
        scale: factor of the product.
    """
    hidden, b = F.linear(x, a.to(x.dtype)).to(output.dtype), b.to(output.dtype)
    if output.is_nested:  # what `nn.TransformerEncoder` makes of a padded batch in eval mode
        return output + F.linear(hidden, b * scale)
    flat = output.reshape(-1, output.shape[-1])
    return torch.addmm(flat, hidden.reshape(-1, a.shape[0]), b.T, alpha=scale).view(output.shape)
