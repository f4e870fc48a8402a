"""Several changes of the same tensor made into one.

With τ_i the change that adapter i makes and w_i its weight, which may be negative:

    linear           τ = Σ w_i τ_i                       task arithmetic (Ilharco et al. 2023,
                                                         https://arxiv.org/abs/2212.04089)
    magnitude_prune  τ = Σ w_i trim(τ_i)                 trim keeps the largest entries
    dare_linear      τ = Σ w_i drop(τ_i)                 DARE (Yu et al. 2024,
                                                         https://arxiv.org/abs/2311.03099)
    ties             τ = consensus of w_i trim(τ_i)      TIES (Yadav et al. 2023,
                                                         https://arxiv.org/abs/2306.01708)
    dare_ties        τ = consensus of w_i drop(τ_i)      both

`density` is the share of the entries that trim and drop leave. Consensus elects, entry by entry,
the sign of Σ τ_i and takes the mean of the w_i τ_i whose τ_i has that sign.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

Thin = Callable[[Tensor, float, Generator], Tensor]
Merge = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


def combined(
    changes: Sequence[Tensor],
    weights: Sequence[float],
    rule: str,
    density: float,
    generator: Generator,
) -> Tensor:
    """Return the combination of `changes`, all of one shape, by a rule of `RULES`.

    Args:
        changes: τ_i, in order.
        weights: w_i, in order.
        rule: a key of `RULES`.
        density: share of the entries of each change that is kept, 0 to 1.
        generator: on the CPU, so that every device drops the same entries.
    """
    thin, merge = RULES[rule]
    kept = [thin(change, density, generator) for change in changes]
    return merge(kept, [w * change for w, change in zip(weights, kept, strict=True)])


def trim(change: Tensor, density: float, generator: Generator) -> Tensor:
    """Return the change with only its entries of largest magnitude, `density` of them."""
    flat = change.flatten()
    places = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, places, flat[places]).view(change.shape)


def drop(change: Tensor, density: float, generator: Generator) -> Tensor:
    """Return the change with entries left out at random and the others divided by `density`."""
    chances = torch.full(change.shape, density, dtype=change.dtype, device="cpu")
    kept = torch.bernoulli(chances, generator=generator).to(change.device)
    return change * kept / density


def truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors of the nearest matrix to `B A` of at most this rank (Eckart and Young 1936).

    It is decomposed by its factors, without being formed: B = Q_b R_b and Aᵀ = Q_a R_a leave
    R_b R_aᵀ, which is as small as the rank that A and B have.

    Args:
        a: `(..., k, in)`.
        b: `(..., out, k)`.
        rank: of the result.

    Returns:
        A `(..., rank, in)` and B `(..., out, rank)`, with √Σ in each; the rank may be lower.
    """
    left, right = torch.linalg.qr(b), torch.linalg.qr(a.mT)
    new_a, new_b = split(left.R @ right.R.mT, rank)
    return new_a @ right.Q.mT, left.Q @ new_b


def split(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors of the nearest matrix to `matrix` of at most this rank, as `truncated`."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    roots = s[..., :rank].sqrt()
    return roots.unsqueeze(-1) * vh[..., :rank, :], u[..., :rank] * roots.unsqueeze(-2)


def _whole(change: Tensor, density: float, generator: Generator) -> Tensor:
    return change


def _sum(changes: Sequence[Tensor], weighted: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(weighted)).sum(0)


def _consensus(changes: Sequence[Tensor], weighted: Sequence[Tensor]) -> Tensor:
    stacked = torch.stack(list(changes))
    elected = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    agrees = stacked.sign() == elected  # what was left out agrees with nobody
    total = (torch.stack(list(weighted)) * agrees).sum(0)
    return total / agrees.sum(0).clamp_min(1)


RULES: dict[str, tuple[Thin, Merge]] = {
    "linear": (_whole, _sum),
    "magnitude_prune": (trim, _sum),
    "ties": (trim, _consensus),
    "dare_linear": (drop, _sum),
    "dare_ties": (drop, _consensus),
}
"""How entries are left out of each change, and what is made of what is left."""
