"""HiRA: Hadamard high-rank adaptation (Huang 2025, https://openreview.net/forum?id=TwJrTz9cRS).

    y = W x + b + (W ⊙ B A) x,    A ∈ R^(r × in),  B ∈ R^(out × r)

The change has up to r times the rank of W. It can only scale what W holds, entry by entry.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from lightning_peft.delta import Delta
from lightning_peft.deltas.hosts import find_hosts, has_matrix
from lightning_peft.deltas.low_rank import Site
from lightning_peft.deltas.weight_delta import DenseDelta, trained, weight_deltas
from lightning_peft.errors import ConfigError
from lightning_peft.method import Method
from lightning_peft.structure.targets import Patterns, Targets


@dataclass(frozen=True, kw_only=True)
class HiRA(Method):
    """A change that is the elementwise product of the weight and a low-rank matrix.

    Raises:
        ConfigError: a setting is out of its range.
    """

    kind: ClassVar[str] = "hira"

    r: int = 32
    """Rank of the matrix; parameters grow with it in proportion."""

    dropout: float = 0.0
    """Probability with which an input of the change is zeroed during training."""

    targets: Targets | Patterns | None = None
    """Which modules: None (the layers' linear projections), patterns, or "all-linear"."""

    layers: Sequence[int] | None = None
    """Indices of the layers to adapt (negative ones count from the top); None adapts all."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"`r` must be at least 1, but is {self.r} instead.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"`dropout` must lie in [0, 1), but is {self.dropout} instead.")

    def deltas(self, model: nn.Module) -> dict[str, Delta]:
        """Return a delta for each target."""
        hosts = find_hosts(model, self.targets, self.layers, has_matrix)
        return weight_deltas(
            model, hosts, lambda site, like: Rescaled(site, like, self.r, self.dropout)
        )


class Rescaled(DenseDelta):
    """The change of one host.

    Shapes: `hira_A` `(r, in)`, `hira_B` `(out, r)`.
    """

    additive = False

    def __init__(self, site: Site, like: Tensor, r: int, dropout: float) -> None:
        super().__init__(site, like, dropout)
        self.hira_A, self.hira_B = trained(like, r, self.width), trained(like, self.height, r)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A is uniform as in a fresh Linear layer, B is zero: the change starts at nothing."""
        nn.init.kaiming_uniform_(self.hira_A, a=math.sqrt(5))
        nn.init.zeros_(self.hira_B)

    def change(self, weight: Tensor) -> Tensor:
        """Return `W ⊙ B A`, `(out, in)`."""
        return weight * (self.hira_B @ self.hira_A)
