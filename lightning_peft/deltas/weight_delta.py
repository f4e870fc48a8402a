"""A delta that is defined by a change ΔW of a weight of its host, whatever kind of layer that is.

    y = W x + b + ΔW x

The weight is seen as a matrix `(out, in)`: that of a Linear as it is, that of transformers'
`Conv1D` and of an embedding transposed, that of a convolution with its filters flattened, those of
fused experts one below the other. ΔW x is added to the output, not ΔW to the weight: in half
precision most of a small change would round to nothing, and a quantised weight cannot be added to.
ΔW itself is added to a weight that is read as a tensor, and, where ΔW has no product with x that
costs less than W's, to a linear layer's weight of full precision.
"""

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.delta import Delta, NotMergeable, Summing, in_forward
from lightning_peft.deltas.hosts import deltas_for
from lightning_peft.deltas.low_rank import Site, fresh
from lightning_peft.deltas.passing import first_input
from lightning_peft.deltas.sites import Kernel, Table
from lightning_peft.structure.anatomy import is_linear

_FULL = (torch.float32, torch.float64)
_SHARED: weakref.WeakValueDictionary[Hashable, Tensor] = weakref.WeakValueDictionary()


class WeightDelta(Delta, ABC):
    """A change of the matrix of one weight."""

    additive = True

    def __init__(self, site: Site, like: Tensor, dropout: float = 0.0) -> None:
        super().__init__()
        *stack, self.width = site.matrix_shape
        self.site, self.height = site, math.prod(stack)
        self.dropout = nn.Dropout(dropout) if dropout and not isinstance(site, Table) else None

    @abstractmethod
    def change(self, weight: Tensor) -> Tensor:
        """Return ΔW, `(out, in)`, for the `weight`, `(out, in)`."""

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
        x, weight = first_input(args, kwargs), self.matrix(own(host, "weight"))
        x = self.dropout(x) if self.dropout else x
        if is_linear(host) and not x.is_nested:
            return self.add(weight, x, output)
        dtype = x.dtype if x.is_floating_point() else output.dtype
        return output + self._apply_to(host, x, self.change(weight).to(dtype)).to(output.dtype)

    def changed(self, weight: Tensor) -> Tensor:
        """Return the weight with the change, in its own shape and in new storage."""
        change = self.change(self.matrix(weight)).view(self.site.matrix_shape)
        return (weight + self.site.fold(change)).to(weight.dtype)

    def merge(self, module: nn.Module) -> None:
        """Add ΔW to the host's weight, which gets new storage."""
        self.merge_into(module, "weight")

    @torch.no_grad()
    def merge_into(self, module: nn.Module, name: str) -> None:
        """Add ΔW to the parameter `name`, which gets new storage.

        Raises:
            NotMergeable: the weight is quantised.
        """
        weight = own(module, name)
        if not weight.is_floating_point():
            raise NotMergeable(f"The weight of {type(module).__name__} is quantised.")
        weight.data = self.changed(weight.data)

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the weight as `(out, in)`."""
        if isinstance(self.site, Kernel):
            return weight.flatten(1)
        return self.site.matrix(weight).flatten(0, -2)

    def _apply_to(self, host: Any, x: Tensor, matrix: Tensor) -> Tensor:
        """Return what the host makes of `x` with `matrix` for its weight, and no bias."""
        if isinstance(self.site, Table):
            return F.embedding(x, matrix.T, self.site.padding_idx) * self.site.output_scale
        if isinstance(self.site, Kernel):
            return host._conv_forward(x, self.site.fold(matrix), None)
        return F.linear(x, matrix)


class DenseDelta(WeightDelta, ABC):
    """A change whose product with x costs as much as the weight's own.

    A linear layer of full precision reads W + ΔW: three matrix products a step, forward and
    backward, where W x + ΔW x takes five.
    """

    sums = True

    def reweigh(self, host: nn.Module, name: str, weight: Tensor) -> Tensor:
        """Return `W + ΔW` where the sum loses nothing; ΔW is that of the host's own weight."""
        if name != "weight" or not in_forward(host) or not self._sums(host):
            return weight
        change = self.change(self.matrix(own(host, name))).view(self.site.matrix_shape)
        return weight + self.site.fold(change).to(weight.dtype)

    def forward(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Return the output, which has the change already, or `output + ΔW x`."""
        return output if self._sums(host) else super().forward(host, args, kwargs, output)

    def _sums(self, host: nn.Module) -> bool:
        weight, drops = own(host, "weight"), self.training and self.dropout is not None
        if weight.dtype not in _FULL or drops or not isinstance(host, Summing):
            return False
        return weight.is_meta or not torch.is_autocast_enabled(weight.device.type)


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


def weight_deltas(
    model: nn.Module, hosts: Mapping[str, nn.Module], make: Callable[[Site, Tensor], WeightDelta]
) -> dict[str, Delta]:
    """Return the delta of each host by name; `make` builds that of one weight."""
    return deltas_for(model, hosts, lambda _, site, like: cast(Any, make(site, like)))


def trained(like: Tensor, *shape: int) -> nn.Parameter:
    """Return a parameter to fill: a master copy, never narrower than float32."""
    return nn.Parameter(fresh(like, shape))


def own(host: nn.Module, name: str) -> Tensor:
    """Return the host's own weight, whatever its deltas make of it."""
    return cast(Tensor, host._parameters[name])


def with_input(args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> tuple[Any, Any]:
    """Return the arguments of a layer with `x` for the one tensor that it was called with."""
    if args:
        return (x, *args[1:]), kwargs
    return args, kwargs | {next(iter(kwargs)): x}
