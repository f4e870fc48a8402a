"""Products with structured matrices, without making the matrices."""

import torch
import torch.nn.functional as F
from torch import Tensor


def add_product(output: Tensor, hidden: Tensor, b: Tensor) -> Tensor:
    """Return `output + hidden Bᵀ` without a temporary as large as `output`.

    Args:
        output: `(..., out)`.
        hidden: `(..., r)`.
        b: `(out, r)`.
    """
    hidden, b = hidden.to(output.dtype), b.to(output.dtype)
    flat = output.reshape(-1, output.shape[-1])
    return torch.addmm(flat, hidden.reshape(-1, b.shape[1]), b.T).view(output.shape)


def khatri_rao(a: Tensor, b: Tensor) -> Tensor:
    """Return all products of a row of `a`, `(r, n)`, and one of `b`, `(s, n)`: `(r · s, n)`."""
    return (a.unsqueeze(1) * b.unsqueeze(0)).flatten(0, 1)


def kronecker_linear(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return `(A ⊗ B) x`.

    Args:
        x: `(..., m · n)`.
        a: `(p, m)`.
        b: `(q, n)`.

    Returns:
        `(..., p · q)`.
    """
    inner = F.linear(x.unflatten(-1, (a.shape[1], b.shape[1])), b)
    return F.linear(inner.transpose(-1, -2), a).transpose(-1, -2).flatten(-2)
