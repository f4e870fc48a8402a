"""LoRA: low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    y = W x + b + s · B A x,    A ∈ R^(r × in),  B ∈ R^(out × r),  s = alpha / r

With `rslora` (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732) s = alpha / √r.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor, nn

from lightning_peft.delta import SLOT, Delta
from lightning_peft.deltas.hosts import check_patterns, deltas_for, find_hosts, first_match
from lightning_peft.deltas.low_rank import LowRank, Product, Site, check_finite, check_rank
from lightning_peft.errors import ConfigError
from lightning_peft.method import Method
from lightning_peft.structure.targets import Patterns, Targets


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Low-rank adaptation of linear layers, fused experts, embeddings and convolutions.

    Raises:
        ConfigError: a setting is out of its range.
    """

    kind: ClassVar[str] = "lora"

    r: int = 8
    """Rank of the change; parameters grow with it in proportion."""

    alpha: float = 16
    """Strength of the change: it is scaled by alpha / r."""

    dropout: float = 0.0
    """Probability with which an input of A is zeroed in training; none where a weight is read."""

    targets: Targets | Patterns | None = None
    """Which modules: None (the layers' linear projections), patterns, or "all-linear"."""

    rslora: bool = False
    """Scale by alpha / sqrt(r), which keeps high ranks (64 and more) learning."""

    bias: Literal["none", "lora", "all"] = "none"
    """Which biases of the base to train too: none, those of the targets, or all."""

    layers: Sequence[int] | None = None
    """Indices of the layers to adapt (negative ones count from the top); None adapts all."""

    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Other ranks for modules by pattern; the first match wins."""

    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Other alphas for modules by pattern; the first match wins."""

    def __post_init__(self) -> None:
        for r in (self.r, *self.rank_pattern.values()):
            check_rank(r, self.dropout, self.alpha)
        for alpha in self.alpha_pattern.values():
            check_finite(alpha_pattern=alpha)
        if self.bias not in ("none", "lora", "all"):
            raise ConfigError(f"`bias` must be none, lora or all, but is {self.bias!r} instead.")

    def deltas(self, model: nn.Module) -> dict[str, Delta]:
        """Return a low-rank delta for each target."""
        hosts = self._hosts(model)
        if patterns := (*self.rank_pattern, *self.alpha_pattern):
            check_patterns(patterns, hosts, "LoRA")
        return deltas_for(model, hosts, self._delta)

    def in_place(self, model: nn.Module) -> list[str]:
        """Return the biases to train, as `bias` says."""
        return [] if self.bias == "none" else self._biases(model)

    def _biases(self, model: nn.Module) -> list[str]:
        roots = tuple(self._hosts(model))
        named = [n for n, _ in model.named_parameters() if SLOT not in n.split(".")]
        biases = [n for n in named if n.endswith("bias")]
        return [n for n in biases if self.bias == "all" or n.rpartition(".")[0] in roots]

    def _hosts(self, model: nn.Module) -> dict[str, nn.Module]:
        return find_hosts(model, self.targets, self.layers)

    def _delta(self, name: str, site: Site, like: Tensor) -> Product:
        r = first_match(self.rank_pattern, name, self.r)
        alpha = first_match(self.alpha_pattern, name, self.alpha)
        scale = alpha / (math.sqrt(r) if self.rslora else r)
        return LowRank(site, like, r, scale, self.dropout)
