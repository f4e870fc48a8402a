"""AdaLoRA: adaptive budget allocation (Zhang et al. 2023, https://arxiv.org/abs/2303.10512).

    y = W x + b + s · P Λ Q x,    s = alpha / init_r
    loss + γ / 2n · Σ (‖PᵀP − I‖_F + ‖QQᵀ − I‖_F)    over n modules

Q is `lora_A` `(init_r, in)`, P `lora_B` `(out, init_r)`, Λ the diagonal `lora_E` `(init_r, 1)`.
While it trains, each entry w has a smoothed sensitivity Ī of |w · ∂loss/∂w| and its uncertainty
Ū of |I − Ī|. A triplet of a value and its two vectors scores the sum of its means of Ī · Ū; over
all modules the values of the lowest scores are set to zero, until `r` a module are left.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_peft.delta import Delta
from lightning_peft.deltas.hosts import deltas_for, find_hosts, is_whole
from lightning_peft.deltas.low_rank import Product, Site, check_rank, fresh, fresh_factors
from lightning_peft.errors import AdapterError, ConfigError
from lightning_peft.method import Method
from lightning_peft.structure.targets import Patterns, Targets


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Method):
    """Low-rank adaptation that moves its ranks, as it trains, to where they matter.

    Raises:
        ConfigError: a setting is out of its range.
    """

    kind: ClassVar[str] = "adalora"
    steers: ClassVar[bool] = True

    r: int = 8
    """Average rank at the end."""

    init_r: int = 12
    """Rank at the start, from which it falls."""

    alpha: float = 16
    """Strength of the change: it is scaled by alpha / init_r."""

    dropout: float = 0.0
    """Probability with which an input is zeroed in training; none where a weight is read."""

    warmup: float = 0.1
    """Share of all optimizer steps before the ranks begin to fall."""

    final: float = 0.5
    """Share of all optimizer steps, at the end, in which the ranks stay what they are."""

    every: int = 10
    """In between, the lowest scores are set to zero in each so-manieth step."""

    beta1: float = 0.85
    """How much of a sensitivity is kept from step to step."""

    beta2: float = 0.85
    """How much of its uncertainty is kept from step to step."""

    orthogonality: float = 0.1
    """Weight γ of the penalty that keeps the vectors of P and Q orthonormal."""

    targets: Targets | Patterns | None = None
    """Which modules: None (the layers' linear projections), patterns, or "all-linear"."""

    layers: Sequence[int] | None = None
    """Indices of the layers to adapt (negative ones count from the top); None adapts all."""

    def __post_init__(self) -> None:
        check_rank(self.r, self.dropout, self.alpha)
        if self.init_r < self.r:
            raise ConfigError(f"`init_r` must be at least {self.r}, but is {self.init_r} instead.")
        if min(self.warmup, self.final) < 0 or self.warmup + self.final > 1:
            raise ConfigError(
                "`warmup` and `final` must be shares that sum to at most 1, but are "
                f"{self.warmup} and {self.final} instead."
            )
        if self.every < 1:
            raise ConfigError(f"`every` must be at least 1, but is {self.every} instead.")
        if wrong := [beta for beta in (self.beta1, self.beta2) if not 0 < beta < 1]:
            raise ConfigError(
                f"`beta1` and `beta2` must lie in (0, 1), but one is {wrong[0]} instead."
            )
        if self.orthogonality < 0:
            raise ConfigError(
                f"`orthogonality` must be 0 or more, but is {self.orthogonality} instead."
            )

    def deltas(self, model: nn.Module) -> dict[str, Delta]:
        """Return a product of three for each target."""
        hosts = find_hosts(model, self.targets, self.layers, is_whole)
        return deltas_for(model, hosts, self._delta)

    def before_step(self, deltas: Mapping[str, Delta], step: int, steps: int) -> None:
        """Add the gradient of the penalty."""
        factors = [f for p in _triplets(deltas) for f in (p.lora_A, p.lora_B)]
        if self.orthogonality and factors:
            with torch.enable_grad():
                departures = torch.stack([_departure(p) for p in _triplets(deltas)])
                penalty = departures.sum() / len(factors)
            for factor, gradient in zip(
                factors, torch.autograd.grad(self.orthogonality * penalty, factors), strict=True
            ):
                factor.grad = gradient if factor.grad is None else factor.grad.add_(gradient)

    @torch.no_grad()
    def after_step(
        self, deltas: Mapping[str, Delta], optimizer: Optimizer, step: int, steps: int
    ) -> None:
        """Update the sensitivities; where the schedule says so, set the lowest values to zero."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        triplets = [p for p in _triplets(deltas) if id(p.lora_E) in held]
        begin, end = self.phases(steps)
        if step < end:
            for triplet in triplets:
                self._observe(triplet, optimizer)
        falling = begin < step < end and step % self.every == 0
        if triplets and (falling or step == end):
            self._allocate(triplets, optimizer, self.budget(step, steps))
        if step >= end:
            for triplet in triplets:
                _keep_allocated(triplet, optimizer, first=step == end)

    def phases(self, steps: int) -> tuple[int, int]:
        """Return the steps in which the ranks begin to fall and are fixed, of all `steps`."""
        return round(self.warmup * steps), steps - max(1, round(self.final * steps))

    def budget(self, step: int, steps: int) -> float:
        """Return the share of the ranks to take away by `step` that is still there, in [0, 1]."""
        begin, end = self.phases(steps)
        left = 1 - (step - begin) / max(1, end - begin)
        return min(1.0, max(0.0, left)) ** 3

    def _delta(self, name: str, site: Site, like: Tensor) -> Product:
        return Triplets(site, like, self.init_r, self.alpha, self.dropout)

    def _observe(self, triplet: "Triplets", optimizer: Optimizer) -> None:
        for parameter in (triplet.lora_A, triplet.lora_E, triplet.lora_B):
            if isinstance(parameter, DTensor):
                raise AdapterError(
                    "AdaLoRA ranks values over the whole model and cannot do so where parameters "
                    "are sharded: train it with `strategy=ddp` or on one device."
                )
            if parameter.grad is None:
                continue
            state, now = optimizer.state[parameter], (parameter * parameter.grad).abs()
            mean = state.setdefault("sensitivity", torch.zeros_like(parameter))
            spread = state.setdefault("uncertainty", torch.zeros_like(parameter))
            mean.mul_(self.beta1).add_(now, alpha=1 - self.beta1)
            spread.mul_(self.beta2).add_((now - mean).abs(), alpha=1 - self.beta2)

    def _allocate(self, triplets: Sequence["Triplets"], optimizer: Optimizer, left: float) -> None:
        scores = [triplet.scores(optimizer) for triplet in triplets]
        every = torch.cat([score.flatten() for score in scores])
        target = every.numel() * self.r // self.init_r
        drop = every.numel() - int((every.numel() - target) * left + target)
        if drop:
            threshold = every.kthvalue(drop).values
            for triplet, score in zip(triplets, scores, strict=True):
                triplet.lora_E.masked_fill_(score <= threshold, 0.0)


class Triplets(Product):
    """The product of three `P Λ Q`.

    Shapes: `lora_A` (Q) and `lora_B` (P) as in LoRA, `lora_E` (Λ) `(r, 1)`, for experts
    `(experts, r, 1)`.
    """

    def __init__(
        self, site: Site, like: Tensor, r: int, alpha: float, dropout: float = 0.0
    ) -> None:
        super().__init__(site, alpha / (r + 1e-5), dropout)  # as the authors' code has it
        self.lora_A, self.lora_B = fresh_factors(site, like, r)
        self.lora_E = nn.Parameter(fresh(like, (*site.stack, r, 1)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """P and Q are small and random, the values zero: the change starts at nothing."""
        nn.init.zeros_(self.lora_E)
        nn.init.normal_(self.lora_A, std=0.02)
        nn.init.normal_(self.lora_B, std=0.02)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return `Λ Q` and `P`."""
        values = self.lora_E
        return self.lora_A * values.reshape(*values.shape[:-1], *self._ones()), self.lora_B

    def scores(self, optimizer: Optimizer) -> Tensor:
        """Return each triplet's importance, of the shape of `lora_E`."""

        def importance(parameter: Tensor) -> Tensor:
            state: Any = optimizer.state.get(parameter, {})
            if "sensitivity" not in state:  # it has had no gradient
                return torch.zeros_like(parameter)
            return state["sensitivity"] * state["uncertainty"]

        q, p = (self.site.flat(importance(f)) for f in (self.lora_A, self.lora_B))
        vectors = q.mean(-1, keepdim=True) + p.mean(-2).unsqueeze(-1)
        return importance(self.lora_E) + vectors

    def _ones(self) -> tuple[int, ...]:
        rows = self.site.rank_dims[0] % self.lora_A.dim()
        return (1,) * (self.lora_A.dim() - rows - 1)


def _triplets(deltas: Mapping[str, Delta]) -> list[Triplets]:
    modules = [module for delta in deltas.values() for module in delta.modules()]
    return [module for module in modules if isinstance(module, Triplets)]


def _departure(triplet: Triplets) -> Tensor:
    """Return how far P and Q are from orthonormal, summed over a stack of experts."""
    q, p = (triplet.site.flat(factor) for factor in (triplet.lora_A, triplet.lora_B))
    own = torch.eye(q.shape[-2], dtype=q.dtype, device=q.device)
    norms = [torch.linalg.matrix_norm(m - own) for m in (q @ q.mT, p.mT @ p)]
    return norms[0].sum() + norms[1].sum()


def _keep_allocated(triplet: Triplets, optimizer: Optimizer, first: bool) -> None:
    """Keep values that were set to zero there, from the step that fixes the ranks on."""
    state: Any = optimizer.state.get(triplet.lora_E)
    if not state:  # it has had no gradient, and its values are still zero
        return
    if first:
        state["kept"] = (triplet.lora_E != 0).to(triplet.lora_E.dtype)
        for parameter in (triplet.lora_A, triplet.lora_E, triplet.lora_B):
            for name in ("sensitivity", "uncertainty"):
                optimizer.state[parameter].pop(name, None)
    if "kept" in state:
        triplet.lora_E.mul_(state["kept"])
