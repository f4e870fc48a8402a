"""Low-rank products of several adapters, each for its own rows of a batch, in two products."""

import torch
from torch import Tensor


def add_stacked(output: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return `output + (x Aᵀ) Bᵀ` with an A and a B for each row of a batch.

    Args:
        output: what the host computed, `(rows · k, ..., out)`.
        x: what the host received, `(rows · k, ..., in)`; k that belong together follow one another.
        a: `(rows, r, in)`.
        b: `(rows, out, r)`, with the scale in it.
    """
    rows = len(a)
    hidden = torch.bmm(x.reshape(rows, -1, x.shape[-1]), a.to(x.dtype).mT).to(output.dtype)
    flat = output.reshape(rows, -1, output.shape[-1])
    return torch.baddbmm(flat, hidden, b.to(output.dtype).mT).view(output.shape)
