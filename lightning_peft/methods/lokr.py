"""LoKr: low-rank Kronecker product adaptation (Yeh 2024, https://arxiv.org/abs/2309.14859).

After KronA (Edalati et al. 2022, https://arxiv.org/abs/2212.10650):

    y = W x + b + s · (C ⊗ D) x,    C ∈ R^(p × m),  D ∈ R^(q × n),  p q = out,  m n = in

D is B A of rank r where that is smaller, and so is C with `decompose_both`; s = alpha / r. The
product with C ⊗ D is two small ones: C ⊗ D itself is never made for a linear layer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, kron, nn

from lightning_peft.delta import Delta
from lightning_peft.deltas.hosts import find_hosts
from lightning_peft.deltas.low_rank import Site, check_finite
from lightning_peft.deltas.sites import Kernel
from lightning_peft.deltas.weight_delta import WeightDelta, trained, weight_deltas
from lightning_peft.errors import ConfigError
from lightning_peft.method import Method
from lightning_peft.ops.structured import kronecker_linear
from lightning_peft.structure.targets import Patterns, Targets


@dataclass(frozen=True, kw_only=True)
class LoKr(Method):
    """A change that is the Kronecker product of two small matrices.

    Raises:
        ConfigError: a setting is out of its range.
    """

    kind: ClassVar[str] = "lokr"

    r: int = 8
    """Rank of the factors that are decomposed: those wider than 2 r."""

    alpha: float = 8
    """Strength of the change: it is scaled by alpha / r."""

    factor: int | None = None
    """The small factor's height and width, at most; None makes both factors alike in size."""

    decompose_both: bool = False
    """Whether the small factor is decomposed too."""

    targets: Targets | Patterns | None = None
    """Which modules: None (the layers' linear projections), patterns, or "all-linear"."""

    layers: Sequence[int] | None = None
    """Indices of the layers to adapt (negative ones count from the top); None adapts all."""

    def __post_init__(self) -> None:
        check_finite(alpha=self.alpha)
        if self.r < 1:
            raise ConfigError(f"`r` must be at least 1, but is {self.r} instead.")
        if self.factor is not None and self.factor < 1:
            raise ConfigError(f"`factor` must be at least 1 or None, but is {self.factor} instead.")

    def deltas(self, model: nn.Module) -> dict[str, Delta]:
        """Return a delta for each target."""
        hosts = find_hosts(model, self.targets, self.layers)
        return weight_deltas(model, hosts, lambda site, like: Kronecker(site, like, self))


class Kronecker(WeightDelta):
    """The change of one host.

    Shapes: `lokr_w1` `(p, m)`, or `lokr_w1_a` `(p, r)` and `lokr_w1_b` `(r, m)`; `lokr_w2`
    `(q, n, *kernel)`, or `lokr_w2_a` `(q, r)` and `lokr_w2_b` `(r, n · kernel)`.
    """

    def __init__(self, site: Site, like: Tensor, method: LoKr) -> None:
        super().__init__(site, like)
        kernel = site.weight[2:] if isinstance(site, Kernel) else ()
        p, q = split(self.height, method.factor)
        m, n = split(self.width // math.prod(kernel), method.factor)
        self.scale, r = method.alpha / method.r, method.r
        if method.decompose_both and 2 * r < max(p, m):
            self.lokr_w1_a, self.lokr_w1_b = trained(like, p, r), trained(like, r, m)
        else:
            self.lokr_w1 = trained(like, p, m)
        if 2 * r < max(q, n):
            self.lokr_w2_a = trained(like, q, r)
            self.lokr_w2_b = trained(like, r, n * math.prod(kernel))
        else:
            self.lokr_w2 = trained(like, q, n, *kernel)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All are uniform as in a fresh Linear layer but the first, which is zero."""
        first, *others = self.parameters()
        nn.init.zeros_(first)
        for parameter in others:
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return C, `(p, m)`, and D, `(q, n · kernel)`."""
        named = self._parameters
        c = self.lokr_w1 if "lokr_w1" in named else self.lokr_w1_a @ self.lokr_w1_b
        d = self.lokr_w2.flatten(1) if "lokr_w2" in named else self.lokr_w2_a @ self.lokr_w2_b
        return c, d

    def change(self, weight: Tensor) -> Tensor:
        """Return `s · C ⊗ D`, `(out, in)`."""
        c, d = self.factors()
        return kron(self.scale * c, d.contiguous())

    def add(self, weight: Tensor, x: Tensor, output: Tensor) -> Tensor:
        """Return `output + s · (C ⊗ D) x`."""
        c, d = (factor.to(x.dtype) for factor in self.factors())
        return output + kronecker_linear(x, self.scale * c, d).to(output.dtype)


def split(width: int, factor: int | None) -> tuple[int, int]:
    """Return two factors of `width`, the smaller first: the most alike, or the first `factor`.

    A `factor` that does not divide the width is taken for the largest that the first may be.
    """
    if factor is not None and width % factor == 0:
        return factor, width // factor
    most = math.isqrt(width) if factor is None else min(factor, math.isqrt(width))
    small = max(n for n in range(1, most + 1) if width % n == 0)
    return small, width // small
