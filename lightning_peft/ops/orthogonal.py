"""Rotations by skew-symmetric matrices, and products with block-diagonal ones."""

import functools

import torch
from torch import Tensor


def cayley(skew: Tensor) -> Tensor:
    """Return `R - I` for the rotation `R = (I - Q)(I + Q)⁻¹`.

    That it is zero for Q = 0 makes a fresh rotation exact, in any precision.

    Args:
        skew: skew-symmetric matrices Q, `(blocks, n, n)`.
    """
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(identity + skew, -2 * skew, left=False)


def cayley_series(skew: Tensor, terms: int) -> Tensor:
    """Return `R - I` for the near rotation `R = I + 2Q + 2Q² + … + Qⁿ`, n = `terms` - 1.

    It is the Neumann series of `(I + Q)(I - Q)⁻¹`: no inverse, but orthogonal only for small Q.

    Args:
        skew: skew-symmetric matrices Q, `(blocks, n, n)`.
        terms: at least 3.
    """
    series = skew
    for _ in range(terms - 2):
        series = 2 * skew + skew @ series
    return series


def multiply_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """Return `x` times the matrix that has `blocks` on its diagonal.

    Args:
        x: `(..., count · n)`.
        blocks: `(count, n, n)`.
    """
    parts = x.unflatten(-1, blocks.shape[:2])
    return torch.einsum("...bi,bij->...bj", parts, blocks.to(x.dtype)).flatten(-2)


@functools.cache
def nearest_divisor(width: int, wanted: int) -> int:
    """Return the divisor of `width` nearest to `wanted`, the smaller of two; 1 only for 1."""
    divisors = [n for n in range(2, width + 1) if width % n == 0]
    return min(divisors, key=lambda n: (abs(n - wanted), n), default=1)
