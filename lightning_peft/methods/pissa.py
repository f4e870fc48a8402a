"""PiSSA: principal singular values and vectors adaptation (Meng et al. 2024).

https://arxiv.org/abs/2404.02948

    W = U S Vᵀ,    A₀ = √(S_r / s) V_rᵀ,    B₀ = U_r √(S_r / s),    s = alpha / r

    y = W x + b + s · (B A − B₀ A₀) x

A `(r, in)` and B `(out, r)` start at A₀ and B₀, the r largest singular directions. The paper takes
s · B₀ A₀ out of the weight; here the weight stays, and the difference from the start is added: the
same function, and an adapter that fits the clean base.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.delta import Delta
from lightning_peft.deltas.departure import Departure
from lightning_peft.deltas.hosts import deltas_for, find_hosts, has_matrix
from lightning_peft.deltas.low_rank import Product, Site, check_rank
from lightning_peft.deltas.sites import values_of
from lightning_peft.errors import ConfigError
from lightning_peft.method import Method
from lightning_peft.structure.targets import Patterns, Targets


@dataclass(frozen=True, kw_only=True)
class PiSSA(Method):
    """Low-rank adaptation that starts from the weight's largest singular directions.

    Raises:
        ConfigError: a setting is out of its range.
    """

    kind: ClassVar[str] = "pissa"

    r: int = 8
    """Rank of the trained part; parameters grow with it in proportion."""

    alpha: float = 8
    """Strength of the change: it is scaled by alpha / r."""

    dropout: float = 0.0
    """Probability with which an input of A is zeroed in training; none where a weight is read."""

    targets: Targets | Patterns | None = None
    """Which modules: None (the layers' linear projections), patterns, or "all-linear"."""

    layers: Sequence[int] | None = None
    """Indices of the layers to adapt (negative ones count from the top); None adapts all."""

    niter: int = 16
    """Iterations of the fast decomposition; 0 takes the exact one, slow for wide models."""

    def __post_init__(self) -> None:
        check_rank(self.r, self.dropout, self.alpha)
        if self.niter < 0:
            raise ConfigError(f"`niter` must be 0 or more, but is {self.niter} instead.")

    def deltas(self, model: nn.Module) -> dict[str, Delta]:
        """Return the departure from the principal part for each target."""
        hosts = find_hosts(model, self.targets, self.layers, has_matrix)
        return deltas_for(model, hosts, self._delta)

    def _delta(self, name: str, site: Site, weight: Tensor) -> Product:
        scale = self.alpha / self.r
        start = principal(values_of(site, weight, "PiSSA"), self.r, self.niter)
        return Departure(
            site, (start[0] / scale**0.5, start[1] / scale**0.5), self.r, scale, self.dropout
        )


@torch.no_grad()
def principal(matrix: Tensor, r: int, niter: int) -> tuple[Tensor, Tensor]:
    """Return `√S Vᵀ` `(..., r, in)` and `U √S` `(..., out, r)` of the r largest singular values.

    Args:
        matrix: `(..., out, in)`.
        r: how many, or fewer where the matrix has a lower rank.
        niter: iterations of the fast decomposition; 0 takes the exact one.
    """
    r = min(r, *matrix.shape[-2:])
    if niter:
        u, s, v = torch.svd_lowrank(matrix, r, niter)
        vh = v.mT
    else:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = s[..., :r].sqrt()
    return root.unsqueeze(-1) * vh[..., :r, :], u[..., :r] * root.unsqueeze(-2)
