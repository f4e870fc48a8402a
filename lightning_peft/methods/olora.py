"""OLoRA: orthonormal low-rank adaptation (Büyükakyüz 2024, https://arxiv.org/abs/2406.01775).

    W = Q R,    A₀ = R_r,    B₀ = Q_r

    y = W x + b + s · (B A − B₀ A₀) x,    s = alpha / r

A `(r, in)` and B `(out, r)` start at the first r rows of R and columns of Q. The paper takes
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
from lightning_peft.method import Method
from lightning_peft.structure.targets import Patterns, Targets


@dataclass(frozen=True, kw_only=True)
class OLoRA(Method):
    """Low-rank adaptation that starts from an orthonormal basis of the weight.

    Raises:
        ConfigError: a setting is out of its range.
    """

    kind: ClassVar[str] = "olora"

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

    def __post_init__(self) -> None:
        check_rank(self.r, self.dropout, self.alpha)

    def deltas(self, model: nn.Module) -> dict[str, Delta]:
        """Return the departure from the orthonormal start for each target."""
        hosts = find_hosts(model, self.targets, self.layers, has_matrix)
        return deltas_for(model, hosts, self._delta)

    def _delta(self, name: str, site: Site, weight: Tensor) -> Product:
        q, r = torch.linalg.qr(values_of(site, weight, "OLoRA"))
        start = r[..., : self.r, :], q[..., : self.r]
        return Departure(site, start, self.r, self.alpha / self.r, self.dropout)
