"""LN-tuning: train the normalisation layers and nothing else (Zhao et al. 2023).

https://arxiv.org/abs/2312.11420. Gains and biases of every LayerNorm, RMSNorm, GroupNorm and
BatchNorm are trained in place: nothing is added, and a forward pass costs what it did.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lightning_peft.errors import TargetError
from lightning_peft.method import Method
from lightning_peft.structure import anatomy
from lightning_peft.structure.sublayers import is_norm
from lightning_peft.structure.targets import Patterns, Targets


@dataclass(frozen=True, kw_only=True)
class LNTuning(Method):
    """Train the model's normalisation layers in place."""

    kind: ClassVar[str] = "ln_tuning"

    bias: bool = True
    """Train the biases of the norms too, not their gains alone."""

    targets: Patterns | None = None
    """Patterns of the norms to train; None takes all."""

    layers: Sequence[int] | None = None
    """Indices of the layers whose norms are trained (negative ones count from the top)."""

    def in_place(self, model: nn.Module) -> list[str]:
        """Return the names of the norms' parameters.

        Raises:
            TargetError: the model's norms have no parameters, or the settings name none of them.
        """
        norms = [(n, m) for n, m in anatomy.base_modules(model) if is_norm(m)]
        if not norms:
            raise TargetError(
                f"{type(model).__name__} has no norm with weights to train: take `IA3`, which is "
                "as small."
            )
        if self.targets is not None or self.layers is not None:
            chosen = Targets(self.targets or "*", layers=self.layers)
            norms = list(chosen.find(model, is_norm, "norms with weights").items())
        owned = {f"{n}.{p}" for n, m in norms for p, _ in m.named_parameters(recurse=False)}
        named = [n for n, _ in model.named_parameters()]
        return [n for n in named if n in owned and (self.bias or not n.endswith("bias"))]
