"""VeRA: vector-based random matrix adaptation (Kopiczko 2024, https://arxiv.org/abs/2310.11454).

    y = W x + b + Λ_b B Λ_d A x,    A ∈ R^(r × in),  B ∈ R^(out × r),  Λ diagonal

A and B are random, frozen, and shared by all layers: each takes the first columns of the one A and
the first rows of the one B that the largest layer needs. Only the two diagonals are trained, and of
A and B only the seed is stored.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.delta import Delta
from lightning_peft.deltas.hosts import find_hosts
from lightning_peft.deltas.low_rank import Site
from lightning_peft.deltas.weight_delta import DerivedDelta, shared, trained, weight_deltas
from lightning_peft.errors import ConfigError
from lightning_peft.method import Method
from lightning_peft.structure.targets import Patterns, Targets


@dataclass(frozen=True, kw_only=True)
class VeRA(Method):
    """Trained diagonals around random matrices that all layers share.

    Raises:
        ConfigError: a setting is out of its range.
    """

    kind: ClassVar[str] = "vera"

    r: int = 256
    """Rank of the change; a layer trains r + out numbers, so it can be high."""

    d_initial: float = 0.1
    """What the inner diagonal starts with; the paper recommends at most 0.1."""

    dropout: float = 0.0
    """Probability with which an input of A is zeroed during training."""

    seed: int = 0
    """Seed of A and B; all that is stored of them."""

    targets: Targets | Patterns | None = None
    """Which modules: None (the layers' linear projections), patterns, or "all-linear"."""

    layers: Sequence[int] | None = None
    """Indices of the layers to adapt (negative ones count from the top); None adapts all."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"`r` must be at least 1, but is {self.r} instead.")
        if not self.d_initial:
            raise ConfigError("`d_initial` must not be 0, or nothing would ever get a gradient.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"`dropout` must lie in [0, 1), but is {self.dropout} instead.")

    def deltas(self, model: nn.Module) -> dict[str, Delta]:
        """Return a delta for each target; all look at the same A and B."""
        hosts = find_hosts(model, self.targets, self.layers)
        deltas = weight_deltas(model, hosts, lambda site, like: ScaledProjections(site, like, self))
        every = [m for d in deltas.values() for m in d.modules() if isinstance(m, DerivedDelta)]
        widest = max(d.height for d in every), max(d.width for d in every)
        for delta in every:
            delta.widest = widest  # type: ignore[assignment]
            delta.settle()
        return deltas


class ScaledProjections(DerivedDelta):
    """The change of one host.

    Shapes: `vera_lambda_d` `(r,)`, `vera_lambda_b` `(out,)`; the shared A, `down`, `(r, in)` and
    B, `up`, `(out, r)` of the widest host.
    """

    constants = ("down", "up")
    down: Tensor
    up: Tensor

    def __init__(self, site: Site, like: Tensor, method: VeRA) -> None:
        super().__init__(site, like, method.dropout)
        self.seed, self.d_initial = method.seed, method.d_initial
        self.widest = self.height, self.width
        self.vera_lambda_d, self.vera_lambda_b = trained(like, method.r), trained(like, self.height)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The outer diagonal is zero: the change starts at nothing."""
        nn.init.constant_(self.vera_lambda_d, self.d_initial)
        nn.init.zeros_(self.vera_lambda_b)
        self.settle()

    def derive(self, device: torch.device) -> Mapping[str, Tensor]:
        """Return A and B."""
        d = self.vera_lambda_d
        key = (self.seed, len(d), *self.widest, d.dtype)
        a, b = (shared(make, *key, device=device) for make in (_projection_in, _projection_out))
        return {"down": a, "up": b}

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return `Λ_d A`, `(r, in)`, and `Λ_b B`, `(out, r)`."""
        d, b = self.vera_lambda_d, self.vera_lambda_b
        return d[:, None] * self.down[:, : self.width], b[:, None] * self.up[: len(b)]

    def change(self, weight: Tensor) -> Tensor:
        """Return `Λ_b B Λ_d A`, `(out, in)`."""
        a, b = self.factors()
        return b @ a

    def add(self, weight: Tensor, x: Tensor, output: Tensor) -> Tensor:
        """Return `output + Λ_b B Λ_d A x`, without a gradient as large as A or B."""
        d, b = self.vera_lambda_d.to(x.dtype), self.vera_lambda_b.to(output.dtype)
        hidden = F.linear(x, self.down[:, : self.width].to(x.dtype)) * d
        wide = F.linear(hidden.to(output.dtype), self.up[: len(b)].to(output.dtype))
        return torch.addcmul(output, wide, b)


def _projection_in(seed: int, r: int, out: int, into: int, dtype: torch.dtype) -> Tensor:
    return _draw(seed, r, out, into)[0].to(dtype)


def _projection_out(seed: int, r: int, out: int, into: int, dtype: torch.dtype) -> Tensor:
    return _draw(seed, r, out, into)[1].to(dtype)


def _draw(seed: int, r: int, out: int, into: int) -> tuple[Tensor, Tensor]:
    # Both from one generator, A first, in float32: peft's numbers for the same seed.
    generator = torch.Generator("cpu").manual_seed(seed)
    a, b = (torch.empty(shape, device="cpu") for shape in ((r, into), (out, r)))
    for matrix in (a, b):
        bound = math.sqrt(3) * (math.sqrt(2) / math.sqrt(matrix.shape[1]))
        matrix.uniform_(-bound, bound, generator=generator)
    return a, b
