"""EVA: explained variance adaptation (Paischer et al. 2024, https://arxiv.org/abs/2410.07170).

    y = W x + b + s · B A x,    A₀ = V_r,    B₀ = 0,    s = alpha / r

LoRA whose A `(r, in)` starts at the r directions in which the layer's inputs vary most: the first
principal components V_r of what the layer receives in the first batch. B `(out, r)` starts at zero,
so the outputs are the base's. The paper goes on over batches until V_r settles, and then moves
ranks to where they explain more; here every layer keeps rank r.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.delta import Delta
from lightning_peft.deltas.hosts import deltas_for, find_hosts
from lightning_peft.deltas.low_rank import LowRank, Product, Site, check_rank
from lightning_peft.method import Method
from lightning_peft.structure.targets import Patterns, Targets

_SPARE = 8
"""So many directions more than asked for make the fast decomposition accurate."""


@dataclass(frozen=True, kw_only=True)
class EVA(Method):
    """Low-rank adaptation that starts from the directions in which a layer's inputs vary most.

    Raises:
        ConfigError: a setting is out of its range.
    """

    kind: ClassVar[str] = "eva"
    starts_from_data: ClassVar[bool] = True

    r: int = 8
    """Rank of the change; parameters grow with it in proportion."""

    alpha: float = 16
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
        """Return a low-rank delta for each target."""
        return deltas_for(model, find_hosts(model, self.targets, self.layers), self._delta)

    def start_from(self, delta: Delta, x: Tensor) -> None:
        """Let A start at the first principal components of `x`, `(rows, in)`.

        What is trained already stays; so does what is no matrix that a layer multiplies by (a
        convolution, experts, a table), and what the rows are too few to tell.
        """
        if not isinstance(delta, LowRank) or type(delta.site) is not Site or delta.lora_B.any():
            return
        directions = principal_directions(x, self.r).to(delta.lora_A.dtype)
        with torch.no_grad():
            delta.lora_A[: len(directions)].copy_(directions)

    def _delta(self, name: str, site: Site, like: Tensor) -> Product:
        return LowRank(site, like, self.r, self.alpha / self.r, self.dropout)


@torch.no_grad()
def principal_directions(x: Tensor, r: int) -> Tensor:
    """Return the r first principal components of rows, or fewer where the rows span fewer.

    Each has length 1, and a largest entry that is positive; the random generators stay as they are.

    Args:
        x: `(rows, in)`.
        r: how many.

    Returns:
        `(r, in)`.
    """
    centred = x.float() - x.float().mean(0)
    rank = min(len(x) - 1, x.shape[1])
    if rank < 1:
        return centred[:0]
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        torch.manual_seed(0)
        _, spread, v = torch.svd_lowrank(centred, min(r + _SPARE, rank), niter=8)
    v = v[:, :r].T[spread[:r] > 1e-6 * spread[0]]
    largest = v.gather(1, v.abs().argmax(1, keepdim=True))
    return v * largest.sign()
