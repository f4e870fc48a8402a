"""DoRA: weight-decomposed low-rank adaptation (Liu et al. 2024, https://arxiv.org/abs/2402.09353).

    W' = m ∘ (W + s · B A) / ‖W + s · B A‖,    m = ‖W‖ + g

The norm is that of each output's weights, `(out,)`; as in the paper's section 4.3 no gradient
passes through it. Trained are A `(r, in)`, B `(out, r)` and g `(out,)`, which starts at zero: so m
starts at the norms of the weights, and the file of an adapter holds no copy of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.delta import Delta
from lightning_peft.deltas.hosts import deltas_for, find_hosts, has_matrix
from lightning_peft.deltas.low_rank import Product, Site, check_rank, fresh, fresh_factors
from lightning_peft.deltas.passing import first_input
from lightning_peft.method import Method
from lightning_peft.ops.low_rank import changed_norm
from lightning_peft.structure.targets import Patterns, Targets


@dataclass(frozen=True, kw_only=True)
class DoRA(Method):
    """Low-rank adaptation of the weights' directions, and their magnitudes beside it.

    Raises:
        ConfigError: a setting is out of its range.
    """

    kind: ClassVar[str] = "dora"

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
        """Return a decomposed low-rank delta for each target."""
        hosts = find_hosts(model, self.targets, self.layers, has_matrix)
        return deltas_for(model, hosts, self._delta)

    def _delta(self, name: str, site: Site, like: Tensor) -> Product:
        return Decomposed(site, like, self.r, self.alpha / self.r, self.dropout)


class Decomposed(Product):
    """A low-rank change of directions, and a change of magnitudes.

    Shapes: `lora_A` and `lora_B` as in LoRA, `magnitude` `(out,)`, for experts
    `(experts, out)`.
    """

    additive = False

    def __init__(
        self, site: Site, like: Tensor, r: int, scale: float, dropout: float = 0.0
    ) -> None:
        super().__init__(site, scale, dropout)
        self.lora_A, self.lora_B = fresh_factors(site, like, r)
        self.magnitude = nn.Parameter(fresh(like, site.matrix_shape[:-1]))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start at nothing: magnitudes are counted from the norms of the weights."""
        self.site.initialise(self.lora_A, self.lora_B)
        nn.init.zeros_(self.magnitude)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A and B."""
        return self.lora_A, self.lora_B

    def gain(self, weight: Tensor) -> Tensor:
        """Return `m / ‖W + s · B A‖ − 1`, `(..., out)`, for the host's weight."""
        a, b = (self.site.flat(factor.detach()) for factor in self.factors())
        before, after = changed_norm(self.site.matrix(weight.detach()), a, b, self.scale)
        safe = after.masked_fill(after == 0, 1.0)  # an output may have no weights
        return (before - after + self.magnitude) / safe

    def forward(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Return `b + m / ‖W + s · B A‖ ∘ (W x + s · B A x)`."""
        weight: Any = host._parameters["weight"]
        bias = host._parameters.get("bias")
        if output.is_nested:  # what `nn.TransformerEncoder` makes of a padded batch in eval mode
            return F.linear(first_input(args, kwargs), self.changed(weight), bias)
        changed: Tensor = super().forward(host, args, kwargs, output)
        gain = self.site.along_output(self.gain(weight)).to(changed.dtype)
        free = changed if bias is None else changed - self.site.along_output(bias)
        return torch.addcmul(changed, free, gain)

    def changed(self, weight: Tensor) -> Tensor:
        """Return the host's weight with the change, in its own dtype and in new storage."""
        matrix = self.site.matrix(super().changed(weight))
        gain = self.gain(weight).unsqueeze(-1).to(matrix.dtype)
        return self.site.fold(matrix.addcmul(matrix, gain))
