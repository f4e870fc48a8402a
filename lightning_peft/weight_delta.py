"""A delta that is defined by a change ΔW of its host's weight, whatever kind of layer that is.

    y = W x + b + ΔW x

The weight is seen as a matrix `(out, in)`: that of a Linear as it is, that of transformers'
`Conv1D` and of an embedding transposed, that of a convolution with its filters flattened. ΔW x is
added to the output, not ΔW to the weight: in half precision most of a small change would round to
nothing, and a quantised weight cannot be added to.
"""

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.anatomy import is_conv1d, is_linear
from lightning_peft.delta import Delta, NotMergeable, slot_of

CHANGEABLE = "Linear, Conv1D, Embedding, Conv1d and Conv2d"
"""What `has_matrix` accepts, in words."""

_SHARED: weakref.WeakValueDictionary[Hashable, Tensor] = weakref.WeakValueDictionary()


class WeightDelta(Delta, ABC):
    """A change of the matrix of one host's weight."""

    reads_weight: ClassVar[bool] = False
    """Whether the change depends on the host's weight."""

    def __init__(self, host: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout) if dropout else None
        # Some tables (BART, Gemma) multiply their rows.
        self.output_scale = float(getattr(host, "embed_scale", None) or 1.0)

    @abstractmethod
    def change(self, weight: Tensor) -> Tensor:
        """Return ΔW, `(out, in)`, for the host's `weight`, `(out, in)`."""

    def add(self, weight: Tensor, x: Tensor, output: Tensor) -> Tensor:
        """Return `output + ΔW x` of a linear host; a cheaper way than by ΔW itself goes here.

        Args:
            weight: the host's, `(out, in)`.
            x: `(..., in)`.
            output: `(..., out)`.
        """
        return output + F.linear(x, self.change(weight).to(x.dtype)).to(output.dtype)

    def forward(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Return `output + ΔW x`."""
        x, weight = input_of(args, kwargs), matrix_of(host)
        x = self.dropout(x) if self.dropout and x.is_floating_point() else x
        if is_linear(host) and not x.is_nested:
            return self.add(weight, x, output)
        dtype = x.dtype if x.is_floating_point() else output.dtype
        added = apply_matrix(host, x, self.change(weight).to(dtype)) * self.output_scale
        return output + added.to(output.dtype)

    @torch.no_grad()
    def merge(self, module: nn.Module) -> None:
        """Add ΔW to the host's weight, which gets new storage.

        Raises:
            NotMergeable: the weight is quantised, or was changed by another delta that the change
                does not know of.
        """
        weight = weight_of(module)
        if not weight.is_floating_point():
            raise NotMergeable(f"The weight of {type(module).__name__} is quantised.")
        if self.reads_weight and len(slot_of(module)) > 1:
            raise NotMergeable(
                f"`{type(self).__name__}` depends on the weight of {type(module).__name__}, which "
                "another delta changes too: remove one of them first."
            )
        change = self.change(matrix_of(module))
        change = change.T if _is_transposed(module) else change.view(weight.shape)
        weight.data = (weight.data + change).to(weight.dtype)


class DerivedDelta(WeightDelta, ABC):
    """A delta with constants that its settings give, such as a random projection by its seed.

    They are made once for all deltas that have the same, and are neither stored nor pickled.
    """

    constants: ClassVar[tuple[str, ...]]
    """The attributes' names."""

    @abstractmethod
    def derive(self, device: torch.device) -> Mapping[str, Tensor]:
        """Return the constants by name."""

    @torch.inference_mode(False)
    def settle(self) -> None:
        """Set the constants, on the device of the parameters."""
        self.__dict__.update(self.derive(next(self.parameters()).device))

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in self.constants}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.settle()

    def _apply(self, fn: Any, recurse: bool = True) -> "DerivedDelta":
        super()._apply(fn, recurse)
        self.settle()
        return self


def shared(make: Callable[..., Tensor], *key: Hashable, device: torch.device) -> Tensor:
    """Return `make(*key)` on `device`, one tensor for all that hold it at the same time."""
    found = _SHARED.get((make, key, device))
    if found is None:
        _SHARED[make, key, device] = found = make(*key).to(device)
    return found


def has_matrix(module: nn.Module) -> bool:
    """Whether the module's weight can be changed as a matrix."""
    return is_linear(module) or isinstance(module, nn.Embedding | nn.Conv1d | nn.Conv2d)


def has_float_matrix(module: nn.Module) -> bool:
    """Whether the module's weight can be read as a matrix, and is not quantised."""
    return has_matrix(module) and weight_of(module).is_floating_point()


def matrix_shape(host: Any) -> tuple[int, int]:
    """Return `(out, in)` of the matrix of a host's weight."""
    if isinstance(host, nn.Embedding):
        return host.embedding_dim, host.num_embeddings
    if isinstance(host, nn.Conv1d | nn.Conv2d):
        return host.out_channels, host.in_channels // host.groups * math.prod(host.kernel_size)
    return host.weight.shape[::-1] if is_conv1d(host) else (host.out_features, host.in_features)


def weight_of(host: nn.Module) -> Tensor:
    """Return the host's own weight, whatever its deltas make of it."""
    return cast(Tensor, host._parameters["weight"])


def matrix_of(host: nn.Module) -> Tensor:
    """Return the host's weight as a matrix `(out, in)`, a view."""
    weight = weight_of(host)
    if _is_transposed(host):
        return weight.T
    return weight.flatten(1) if isinstance(host, nn.Conv1d | nn.Conv2d) else weight


def apply_matrix(host: Any, x: Tensor, matrix: Tensor) -> Tensor:
    """Return what the host makes of `x` with `matrix`, `(out, in)`, for its weight and no bias."""
    if isinstance(host, nn.Embedding):
        return F.embedding(x, matrix.T, host.padding_idx)
    if isinstance(host, nn.Conv1d | nn.Conv2d):
        return host._conv_forward(x, matrix.view(weight_of(host).shape), None)
    return F.linear(x, matrix)


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the one tensor that a layer was called with."""
    return args[0] if args else next(iter(kwargs.values()))


def with_input(args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> tuple[Any, Any]:
    """Return the arguments of a layer with `x` for the one tensor that it was called with."""
    if args:
        return (x, *args[1:]), kwargs
    return args, kwargs | {next(iter(kwargs)): x}


def fresh(host: nn.Module, *shape: int) -> nn.Parameter:
    """Return a parameter to fill: a master copy, never narrower than float32."""
    weight = weight_of(host)
    half = weight.dtype if weight.is_floating_point() else torch.float32
    dtype = torch.promote_types(half, torch.float32)
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=weight.device))


def _is_transposed(host: nn.Module) -> bool:
    return is_conv1d(host) or isinstance(host, nn.Embedding)
