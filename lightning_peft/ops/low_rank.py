"""The low-rank product that LoRA adds to an output."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_peft.ops.dropout import dropped_linear


def add_low_rank(
    output: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """Return `output + scale · (x Aᵀ) Bᵀ` without a temporary as large as `output`.

    The small matrices are cast to the activations' dtype, never the activations to theirs: so the
    backward pass keeps `x` itself, which the host's siblings share, and `x Aᵀ`.

    Args:
        output: what the host computed, `(..., out)`.
        x: what the host received, `(..., in)`.
        a: `(r, in)`.
        b: `(out, r)`.
        scale: factor of the product.
        dropout: probability with which a number of `x` is zeroed.
    """
    a, b = a.to(x.dtype), b.to(output.dtype)
    hidden = (dropped_linear(x, a, dropout) if dropout else F.linear(x, a)).to(output.dtype)
    if output.is_nested:  # what `nn.TransformerEncoder` makes of a padded batch in eval mode
        return output + F.linear(hidden, b * scale)
    flat = output.reshape(-1, output.shape[-1])
    return torch.addmm(flat, hidden.reshape(-1, a.shape[0]), b.T, alpha=scale).view(output.shape)


@torch.no_grad()
def changed_norm(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the norms of each output's weights before and after a low-rank change.

        ‖w + s · b A‖² = ‖w‖² + 2 s · b · (A w) + s² · b (A Aᵀ) bᵀ    for each row w of W, b of B

    Nothing as large as the weight is made. Where B is zero both norms are bitwise equal.

    Args:
        weight: `(..., out, in)`.
        a: `(..., r, in)`.
        b: `(..., out, r)`.
        scale: factor of the product.

    Returns:
        Two tensors `(..., out)` in the precision of `a`.
    """
    square = torch.linalg.vector_norm(weight, dim=-1, dtype=a.dtype).square()
    cross = ((weight @ a.mT.to(weight.dtype)).to(b.dtype) * b).sum(-1)
    own = ((b @ (a @ a.mT)) * b).sum(-1)
    changed = square + (2 * scale) * cross + scale**2 * own
    return square.sqrt(), changed.clamp_min(0).sqrt()
