"""A delta that turns the input of its host, which is to turn the rows of the weight.

    y = W (Rᵀ x) + b = (W Rᵀ) x + b

A layer that is linear in its input gets it turned; a convolution, whose input is not the vector
that its filters see, gets the difference of its weight. Other deltas of the same host see the
turned input too.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.deltas.hosts import has_matrix
from lightning_peft.deltas.passing import first_input
from lightning_peft.deltas.sites import site_of
from lightning_peft.deltas.weight_delta import WeightDelta, with_input
from lightning_peft.structure.anatomy import is_linear, read_weights
from lightning_peft.structure.targets import Patterns, Targets, as_targets

_ROTATABLE = "layers with an input wider than 1 that are neither embeddings nor quantised"


class Rotation(WeightDelta, ABC):
    """A rotation of one host's input."""

    additive = False

    @abstractmethod
    def turn(self, x: Tensor) -> Tensor:
        """Return `x R - x` for rows `(..., in)`: nothing, exactly, where nothing is turned yet."""

    def as_matrix(self, like: Tensor) -> Tensor:
        """Return `R - I`, `(in, in)`, in the dtype of the delta."""
        return self.turn(torch.eye(self.width, dtype=like.dtype, device=like.device))

    def before(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Return the inputs of `host`, turned if it is linear."""
        if not is_linear(host):
            return args, kwargs
        x = first_input(args, kwargs)
        added = F.linear(x, self.as_matrix(x).T) if x.is_nested else self.turn(x)
        return with_input(args, kwargs, x + added)

    def forward(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Return the output; of a convolution with what its turned filters add."""
        return output if is_linear(host) else super().forward(host, args, kwargs, output)

    def change(self, weight: Tensor) -> Tensor:
        """Return `W Rᵀ - W`, `(out, in)`."""
        turn = self.as_matrix(next(self.parameters()))
        return weight.to(turn.dtype) @ turn.T


def find_rotatable(
    model: nn.Module, targets: Targets | Patterns | None, layers: Sequence[int] | None
) -> dict[str, nn.Module]:
    """Return the modules with an input to turn, by name."""
    return as_targets(targets, layers).find(model, _is_rotatable, _ROTATABLE)


def _is_rotatable(module: nn.Module) -> bool:
    if not has_matrix(module) or isinstance(module, nn.Embedding):
        return False
    return bool(read_weights(module)) or site_of(module).matrix_shape[-1] > 1
