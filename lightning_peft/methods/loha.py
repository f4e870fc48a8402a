"""LoHa: low-rank Hadamard product adaptation (Yeh et al. 2024, https://arxiv.org/abs/2309.14859).

After FedPara (Hyeon-Woo et al. 2022, https://arxiv.org/abs/2108.06098):

    y = W x + b + s · (B₁ A₁ ⊙ B₂ A₂) x,    Aᵢ ∈ R^(r × in),  Bᵢ ∈ R^(out × r),  s = alpha / r

The elementwise product of two matrices of rank r has rank r². It is also the plain product of the
Khatri-Rao products of their factors, which is how it is applied where that costs less.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from lightning_peft.delta import Delta
from lightning_peft.deltas.hosts import find_hosts
from lightning_peft.deltas.low_rank import Site, check_finite
from lightning_peft.deltas.weight_delta import WeightDelta, trained, weight_deltas
from lightning_peft.errors import ConfigError
from lightning_peft.method import Method
from lightning_peft.ops.low_rank import add_low_rank
from lightning_peft.ops.structured import khatri_rao
from lightning_peft.structure.targets import Patterns, Targets


@dataclass(frozen=True, kw_only=True)
class LoHa(Method):
    """A change that is the elementwise product of two low-rank ones.

    Raises:
        ConfigError: a setting is out of its range.
    """

    kind: ClassVar[str] = "loha"

    r: int = 8
    """Rank of each of the two matrices; the change has rank r²."""

    alpha: float = 8
    """Strength of the change: it is scaled by alpha / r."""

    targets: Targets | Patterns | None = None
    """Which modules: None (the layers' linear projections), patterns, or "all-linear"."""

    layers: Sequence[int] | None = None
    """Indices of the layers to adapt (negative ones count from the top); None adapts all."""

    def __post_init__(self) -> None:
        check_finite(alpha=self.alpha)
        if self.r < 1:
            raise ConfigError(f"`r` must be at least 1, but is {self.r} instead.")

    def deltas(self, model: nn.Module) -> dict[str, Delta]:
        """Return a delta for each target."""
        hosts = find_hosts(model, self.targets, self.layers)
        scale = self.alpha / self.r
        return weight_deltas(model, hosts, lambda site, like: Hadamard(site, like, self.r, scale))


class Hadamard(WeightDelta):
    """The change of one host.

    Shapes: `hada_w1_a` and `hada_w2_a` `(out, r)`, `hada_w1_b` and `hada_w2_b` `(r, in)`.
    """

    def __init__(self, site: Site, like: Tensor, r: int, scale: float) -> None:
        super().__init__(site, like)
        out, into = self.height, self.width
        self.hada_w1_a, self.hada_w1_b = trained(like, out, r), trained(like, r, into)
        self.hada_w2_a, self.hada_w2_b = trained(like, out, r), trained(like, r, into)
        self.scale, self.factored = scale, r * r * (out + into) < out * into
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All are uniform as in a fresh Linear layer but the last, which is zero."""
        for parameter in (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a):
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        nn.init.zeros_(self.hada_w2_b)

    def change(self, weight: Tensor) -> Tensor:
        """Return `s · (B₁ A₁ ⊙ B₂ A₂)`, `(out, in)`."""
        first, second = self.hada_w1_a @ self.hada_w1_b, self.hada_w2_a @ self.hada_w2_b
        return self.scale * first * second

    def add(self, weight: Tensor, x: Tensor, output: Tensor) -> Tensor:
        """Return `output + s · (B₁ A₁ ⊙ B₂ A₂) x`."""
        if not self.factored:
            return super().add(weight, x, output)
        a = khatri_rao(self.hada_w1_b, self.hada_w2_b)
        b = khatri_rao(self.hada_w1_a.T, self.hada_w2_a.T).T
        return add_low_rank(output, x, a, b, self.scale)
