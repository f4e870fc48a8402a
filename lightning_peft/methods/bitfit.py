"""BitFit: train the biases and nothing else (Ben Zaken et al. 2022).

https://arxiv.org/abs/2106.10199. The biases are trained in place: nothing is added to the model,
and a forward pass costs what it did.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lightning_peft.delta import SLOT
from lightning_peft.errors import TargetError
from lightning_peft.method import Method
from lightning_peft.structure import anatomy
from lightning_peft.structure.targets import Patterns, Targets


@dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    """Train the model's biases in place."""

    kind: ClassVar[str] = "bitfit"

    targets: Patterns | None = None
    """Patterns of modules whose biases are trained, such as `query`; None takes all."""

    layers: Sequence[int] | None = None
    """Indices of the layers whose biases are trained (negative ones count from the top)."""

    def in_place(self, model: nn.Module) -> list[str]:
        """Return the names of the biases.

        Raises:
            TargetError: the model has none, or the settings name none of them.
        """
        biases = _biases(model)
        if not biases:
            raise TargetError(
                f"{type(model).__name__} has no biases to train, as most decoders of today: take "
                "`LNTuning` or `IA3`, which are as small."
            )
        if self.targets is None and self.layers is None:
            return biases
        chosen = Targets(self.targets or "*", layers=self.layers)
        hosts = chosen.find(model, _owns_bias, "modules with a bias")
        return [name for name in biases if name.rpartition(".")[0] in hosts]


def _biases(model: nn.Module) -> list[str]:
    heads = tuple(name for name, _ in anatomy.head(model))
    return [
        name
        for name, parameter in model.named_parameters()
        if _is_bias(name, parameter)
        and SLOT not in name.split(".")
        and not anatomy.under(name, heads)
    ]


def _owns_bias(module: nn.Module) -> bool:
    return any(_is_bias(n, p) for n, p in module.named_parameters(recurse=False))


def _is_bias(name: str, parameter: nn.Parameter) -> bool:
    # A table of relative positions is called a bias too, but is a matrix.
    leaf = name.rpartition(".")[2]
    return parameter.dim() == 1 and (leaf == "bias" or leaf.endswith("_bias"))
