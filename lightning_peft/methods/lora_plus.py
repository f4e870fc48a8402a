"""LoRA+: LoRA whose B learns faster (Hayou et al. 2024, https://arxiv.org/abs/2402.12354).

    y = W x + b + s · B A x,    η_B = ratio · η_A,    s = alpha / r

With one learning rate for both, A `(r, in)` and B `(out, r)` cannot both learn features of a wide
model; the paper derives a ratio that grows with the width and recommends 16.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from lightning_peft.delta import Delta
from lightning_peft.deltas.hosts import deltas_for, find_hosts
from lightning_peft.deltas.low_rank import LowRank, Product, Site, check_rank
from lightning_peft.errors import ConfigError
from lightning_peft.method import Method
from lightning_peft.structure.targets import Patterns, Targets


@dataclass(frozen=True, kw_only=True)
class LoRAPlus(Method):
    """Low-rank adaptation whose B has a learning rate of its own.

    Raises:
        ConfigError: a setting is out of its range.
    """

    kind: ClassVar[str] = "lora_plus"

    r: int = 8
    """Rank of the change; parameters grow with it in proportion."""

    alpha: float = 16
    """Strength of the change: it is scaled by alpha / r."""

    ratio: float = 16.0
    """How many times faster B learns than A, whose learning rate is the one that is set."""

    dropout: float = 0.0
    """Probability with which an input of A is zeroed in training; none where a weight is read."""

    targets: Targets | Patterns | None = None
    """Which modules: None (the layers' linear projections), patterns, or "all-linear"."""

    layers: Sequence[int] | None = None
    """Indices of the layers to adapt (negative ones count from the top); None adapts all."""

    def __post_init__(self) -> None:
        check_rank(self.r, self.dropout, self.alpha)
        if not 0 < self.ratio < float("inf"):
            raise ConfigError(f"`ratio` must be positive, but is {self.ratio} instead.")

    def deltas(self, model: nn.Module) -> dict[str, Delta]:
        """Return a low-rank delta for each target."""
        hosts = find_hosts(model, self.targets, self.layers)
        return deltas_for(model, hosts, self._delta)

    def lr_scale(self, parameter: str) -> float:
        """Return the ratio for B, 1 for A."""
        return self.ratio if parameter.endswith("lora_B") else 1.0

    def _delta(self, name: str, site: Site, like: Tensor) -> Product:
        return LowRank(site, like, self.r, self.alpha / self.r, self.dropout)
