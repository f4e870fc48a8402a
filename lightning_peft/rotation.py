"""A delta that turns the input of its host, which is to turn the rows of the weight.

    y = W (Rᵀ x) + b = (W Rᵀ) x + b

A layer that is linear in its input gets it turned; a convolution, whose input is not the vector
that its filters see, gets the difference of its weight. Other deltas of the same host see the
turned input too.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.anatomy import is_linear
from lightning_peft.weight_delta import (
    WeightDelta,
    has_float_matrix,
    input_of,
    matrix_shape,
    with_input,
)

ROTATABLE = "Linear, Conv1D, Conv1d and Conv2d with an input wider than 1, unless quantised"
"""What `rotatable` accepts, in words."""


class Rotation(WeightDelta, ABC):
    """A rotation of one host's input."""

    reads_weight = True

    def __init__(self, host: nn.Module) -> None:
        super().__init__(host)
        self.width = matrix_shape(host)[1]

    @abstractmethod
    def turn(self, x: Tensor) -> Tensor:
        """Return `x R - x` for rows `(..., in)`: nothing, exactly, where nothing is turned yet."""

    def matrix(self, like: Tensor) -> Tensor:
        """Return `R - I`, `(in, in)`, in the dtype of the delta."""
        return self.turn(torch.eye(self.width, dtype=like.dtype, device=like.device))

    def before(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Return the inputs of `host`, turned if it is linear."""
        if not is_linear(host):
            return args, kwargs
        x = input_of(args, kwargs)
        added = F.linear(x, self.matrix(x).T) if x.is_nested else self.turn(x)
        return with_input(args, kwargs, x + added)

    def forward(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Return the output; of a convolution with what its turned filters add."""
        return output if is_linear(host) else super().forward(host, args, kwargs, output)

    def change(self, weight: Tensor) -> Tensor:
        """Return `W Rᵀ - W`, `(out, in)`."""
        turn = self.matrix(next(self.parameters()))
        return weight.to(turn.dtype) @ turn.T


def rotatable(module: nn.Module) -> bool:
    """Whether the module has an input to turn."""
    table = isinstance(module, nn.Embedding)
    return has_float_matrix(module) and not table and matrix_shape(module)[1] > 1
