"""LoftQ: LoRA that starts from what rounding loses (Li et al. 2023).

https://arxiv.org/abs/2310.08659

    A₀, B₀ = 0;    Q_t = q(W − s B_t A_t),    s B_{t+1} A_{t+1} = SVD_r(W − Q_t),    s = alpha / r

    y = W x + b + s · (B A − B₀ A₀) x,    A₀, B₀ = A_T, B_T

A `(r, in)` and B `(out, r)` start at A₀ and B₀, the r largest singular directions of what the
rounding q to few bits loses after T steps. The paper puts Q in the place of the weight, which is
about W − s · B₀ A₀; here the weight stays, and the difference from the start is added: training
begins where the rounded base would, and the adapter fits the clean base.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_peft.delta import Delta
from lightning_peft.deltas.departure import Departure
from lightning_peft.deltas.hosts import deltas_for, find_hosts, has_matrix
from lightning_peft.deltas.low_rank import Product, Site, check_rank
from lightning_peft.deltas.sites import values_of
from lightning_peft.errors import ConfigError
from lightning_peft.method import Method
from lightning_peft.methods.pissa import principal
from lightning_peft.ops.rounding import rounded_to_int8, rounded_to_nf4
from lightning_peft.structure.targets import Patterns, Targets

_ROUNDINGS: dict[int, Callable[[Tensor], Tensor]] = {4: rounded_to_nf4, 8: rounded_to_int8}


@dataclass(frozen=True, kw_only=True)
class LoftQ(Method):
    """Low-rank adaptation that starts from the largest directions of the rounding error.

    Raises:
        ConfigError: a setting is out of its range.
    """

    kind: ClassVar[str] = "loftq"

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

    bits: Literal[4, 8] = 4
    """What the base will be rounded to: 4 (NF4, blocks of 64) or 8 (rows of integers)."""

    iterations: int = 5
    """Steps T of rounding and decomposing; 1 decomposes the error of rounding W itself."""

    niter: int = 16
    """Iterations of the fast decomposition; 0 takes the exact one, slow for wide models."""

    def __post_init__(self) -> None:
        check_rank(self.r, self.dropout, self.alpha)
        if self.bits not in _ROUNDINGS:
            raise ConfigError(f"`bits` must be 4 or 8, but is {self.bits!r} instead.")
        if self.iterations < 1:
            raise ConfigError(f"`iterations` must be at least 1, but is {self.iterations} instead.")
        if self.niter < 0:
            raise ConfigError(f"`niter` must be 0 or more, but is {self.niter} instead.")

    def deltas(self, model: nn.Module) -> dict[str, Delta]:
        """Return the departure from the rounding error's main part for each target."""
        hosts = find_hosts(model, self.targets, self.layers, has_matrix)
        return deltas_for(model, hosts, self._delta)

    def _delta(self, name: str, site: Site, weight: Tensor) -> Product:
        scale = self.alpha / self.r
        a, b = self._error(values_of(site, weight, "LoftQ"))
        start = a / scale**0.5, b / scale**0.5
        return Departure(site, start, self.r, scale, self.dropout)

    @torch.no_grad()
    def _error(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Return factors of what rounding `matrix` `(..., out, in)` loses, with s = 1."""
        rounded, found = _ROUNDINGS[self.bits], torch.zeros_like(matrix)
        for _ in range(self.iterations):
            a, b = principal(matrix - rounded(matrix - found), self.r, self.niter)
            found = b @ a
        return a, b
