"""LoRA behind a gate, which UniPELT puts beside a gated prefix and gated adapters.

UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning (Mao et al. 2022,
https://arxiv.org/abs/2110.07577): the submodules are there together, and for each input gates
choose what they add.

    y = W x + b + g(x) B A x,    g(x) = σ(w · x + c),    A ∈ R^(r × in),  B ∈ R^(out × r)

The gate stands in the place of LoRA's constant alpha / r. The paper's code takes its mean over the
sequence; by default it is each token's own here, so that no token hears of later ones or of
padding. `conf/method/unipelt.yaml` is the whole recipe.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import nn

from lightning_peft.delta import Delta
from lightning_peft.deltas.low_rank import check_rank, fresh
from lightning_peft.deltas.passing import first_input
from lightning_peft.errors import ConfigError
from lightning_peft.method import Method
from lightning_peft.ops.bottleneck import Gating, check_gating, gated
from lightning_peft.structure import anatomy
from lightning_peft.structure.sublayers import fan
from lightning_peft.structure.targets import Patterns, Targets, as_targets


@dataclass(frozen=True, kw_only=True)
class GatedLoRA(Method):
    """Low-rank adaptation of linear layers, scaled by a trained gate instead of a constant.

    Raises:
        ConfigError: a setting is out of its range.
    """

    kind: ClassVar[str] = "gated_lora"

    r: int = 8
    """Rank of the change; parameters grow with it in proportion."""

    dropout: float = 0.0
    """Probability with which an input of A is zeroed in training."""

    gating: Gating = "token"
    """A gate for each token, or their mean over the sequence, which padding then changes."""

    targets: Targets | Patterns | None = None
    """Which modules: None (the layers' linear projections), patterns, or "all-linear"."""

    layers: Sequence[int] | None = None
    """Indices of the layers to adapt (negative ones count from the top); None adapts all."""

    def __post_init__(self) -> None:
        check_rank(self.r, self.dropout)
        check_gating(self.gating)
        if self.gating is None:
            raise ConfigError("`gating` must be token or sequence, but is None: use LoRA instead.")

    def deltas(self, model: nn.Module) -> dict[str, Delta]:
        """Return a gated low-rank delta for each target."""
        called = _called(model)
        hosts = as_targets(self.targets, self.layers).find(
            model, lambda m: id(m) in called, "linear layers that the model calls"
        )
        return {name: GatedLowRank(host, self) for name, host in hosts.items()}


class GatedLowRank(Delta):
    """The gated product beside one linear layer.

    Shapes: input `(..., in)`, `lora_A` `(r, in)`, `lora_B` `(out, r)`, `gate` `(1, in)`,
    `gate_bias` `(1,)`, output `(..., out)`.
    """

    def __init__(self, host: nn.Module, settings: GatedLoRA) -> None:
        super().__init__()
        into, out = fan(host)
        like = next(host.parameters())
        self.lora_A = nn.Parameter(fresh(like, (settings.r, into)))
        self.lora_B = nn.Parameter(fresh(like, (out, settings.r)))
        self.gate = nn.Parameter(fresh(like, (1, into)))
        self.gate_bias = nn.Parameter(fresh(like, (1,)))
        self.settings = settings
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The change starts at nothing, the gate half open."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        nn.init.normal_(self.gate, std=0.02)
        nn.init.zeros_(self.gate_bias)

    def forward(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Return `output + g(x) B A x`."""
        x = first_input(args, kwargs)
        dropped = F.dropout(x, self.settings.dropout, self.training)
        hidden = F.linear(dropped, self.lora_A.to(x.dtype))
        hidden = gated(hidden, x, self.gate, self.gate_bias, self.settings.gating)
        return output + F.linear(hidden.to(output.dtype), self.lora_B.to(output.dtype))


def _called(model: nn.Module) -> set[int]:
    """Return the linear layers that are called; of none, those with a forward of their own."""
    read = anatomy.read_by_parents(model)
    linear = [m for n, m in anatomy.base_modules(model) if n not in read and anatomy.is_linear(m)]
    inside = {id(m) for _, m in anatomy.projections(model)}
    plain = {id(m) for m in linear if not anatomy.read_weights(m)}
    return plain if plain & inside else {id(m) for m in linear}
