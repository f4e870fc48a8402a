"""SHiRA: sparse high-rank adapters (Bhardwaj et al. 2024, https://arxiv.org/abs/2406.13175).

    y = W x + b + s · S x,    S ∈ R^(out × in) with r (in + out) entries that are not zero

The places of the entries are drawn once, from a seed, and only the entries are trained: as many as
LoRA of rank r has, but of high rank, and few enough weights change that adapters hardly collide.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.delta import Delta
from lightning_peft.deltas.hosts import find_hosts
from lightning_peft.deltas.low_rank import Site, check_finite
from lightning_peft.deltas.weight_delta import (
    DenseDelta,
    DerivedDelta,
    shared,
    trained,
    weight_deltas,
)
from lightning_peft.errors import ConfigError
from lightning_peft.method import Method
from lightning_peft.structure.targets import Patterns, Targets


@dataclass(frozen=True, kw_only=True)
class SHiRA(Method):
    """Train a few entries of each weight, at random places.

    Raises:
        ConfigError: a setting is out of its range.
    """

    kind: ClassVar[str] = "shira"

    r: int = 32
    """How many entries: r (in + out), as in LoRA of rank r, or all of a smaller weight."""

    scale: float = 1.0
    """Factor of the change."""

    seed: int = 0
    """Seed of the places; all that is stored of them."""

    targets: Targets | Patterns | None = None
    """Which modules: None (the layers' linear projections), patterns, or "all-linear"."""

    layers: Sequence[int] | None = None
    """Indices of the layers to adapt (negative ones count from the top); None adapts all."""

    def __post_init__(self) -> None:
        check_finite(scale=self.scale)
        if self.r < 1:
            raise ConfigError(f"`r` must be at least 1, but is {self.r} instead.")
        if not self.scale:
            raise ConfigError("`scale` must not be 0, or nothing would ever change.")

    def deltas(self, model: nn.Module) -> dict[str, Delta]:
        """Return a delta for each target."""
        hosts = find_hosts(model, self.targets, self.layers)
        return weight_deltas(model, hosts, lambda site, like: Sparse(site, like, self))


class Sparse(DenseDelta, DerivedDelta):
    """The change of one host.

    Shapes: `shira_weight` `(entries,)`; `places` `(entries,)`, ascending indices into the matrix
    `(out, in)` row by row, which all hosts of one shape share.
    """

    constants = ("places",)
    places: Tensor

    def __init__(self, site: Site, like: Tensor, method: SHiRA) -> None:
        super().__init__(site, like)
        self.seed, self.scale, size = method.seed, method.scale, self.height * self.width
        count = min(method.r * (self.height + self.width), size)
        self.shira_weight = trained(like, count)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All entries are zero: the change starts at nothing."""
        nn.init.zeros_(self.shira_weight)
        self.settle()

    def derive(self, device: torch.device) -> Mapping[str, Tensor]:
        """Return the places."""
        key = (self.seed, self.height * self.width, len(self.shira_weight))
        return {"places": shared(_places, *key, device=device)}

    def change(self, weight: Tensor) -> Tensor:
        """Return `s · S`, `(out, in)`."""
        entries = self.scale * self.shira_weight
        flat = entries.new_zeros(self.height * self.width).scatter(0, self.places, entries)
        return flat.view(self.height, self.width)


def _places(seed: int, size: int, count: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randperm(size, generator=generator, device="cpu")[:count].sort().values
