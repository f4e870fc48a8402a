"""MiSS: matrix shard sharing (Kang and Yin 2024, https://arxiv.org/abs/2409.15371).

    y = W x + b + D S x,    D ∈ R^(out × r) trained,    S = [I_r I_r … I_r] ∈ R^(r × in)

The input is cut into shards of width r, which are summed: all columns of ΔW that are r apart share
one trained column. There is one matrix instead of LoRA's two, and it starts at zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.delta import Delta
from lightning_peft.deltas.hosts import find_hosts
from lightning_peft.deltas.low_rank import Site
from lightning_peft.deltas.weight_delta import WeightDelta, trained, weight_deltas
from lightning_peft.errors import ConfigError
from lightning_peft.method import Method
from lightning_peft.ops.structured import add_product
from lightning_peft.structure.targets import Patterns, Targets


@dataclass(frozen=True, kw_only=True)
class MiSS(Method):
    """One trained matrix for the sum of the input's shards.

    Raises:
        ConfigError: a setting is out of its range.
    """

    kind: ClassVar[str] = "miss"

    r: int = 64
    """Width of a shard, and rank of the change; at most the input's width."""

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
        hosts = find_hosts(model, self.targets, self.layers)
        return weight_deltas(
            model, hosts, lambda site, like: Shards(site, like, self.r, self.dropout)
        )


class Shards(WeightDelta):
    """The change of one host.

    Shapes: `miss_block` `(r, out)`, the transposed D.
    """

    def __init__(self, site: Site, like: Tensor, r: int, dropout: float) -> None:
        super().__init__(site, like, dropout)
        self.miss_block = trained(like, min(r, self.width), self.height)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """D is zero: the change starts at nothing."""
        nn.init.zeros_(self.miss_block)

    def change(self, weight: Tensor) -> Tensor:
        """Return `D S`, `(out, in)`; the last shard may be narrower."""
        repeats = -(-self.width // len(self.miss_block))
        return self.miss_block.T.repeat(1, repeats)[:, : self.width]

    def add(self, weight: Tensor, x: Tensor, output: Tensor) -> Tensor:
        """Return `output + D S x`."""
        r = len(self.miss_block)
        padded = F.pad(x, (0, -self.width % r)) if self.width % r else x
        return add_product(output, padded.unflatten(-1, (-1, r)).sum(-2), self.miss_block.T)
