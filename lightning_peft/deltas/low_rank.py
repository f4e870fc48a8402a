"""Changes of a weight by a product of two small factors.

    ΔW = s · B A,    A ∈ R^(r × in),  B ∈ R^(out × r)

A `Site` knows how such a product acts beside a linear layer (`sites.py` has the other kinds of
host); a `Product` is a delta that says what its factors are made of. So a method of LoRA's family
states its own arithmetic alone.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.delta import Delta, NotMergeable
from lightning_peft.deltas.passing import first_input
from lightning_peft.errors import ConfigError
from lightning_peft.ops.low_rank import add_low_rank

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Site:
    """A weight of shape `(out, in)`, or a stack of such, and how a product acts beside it."""

    weight: Shape
    """Shape of the weight as its host keeps it."""

    transposed: bool = False
    """Whether the host keeps it as `(in, out)`."""

    takes_ids: ClassVar[bool] = False
    """Whether its input are ids, none of which can be dropped."""

    rank_dims: ClassVar[tuple[int, int]] = (-2, -1)
    """The dimensions of A and of B that are as long as the rank."""

    @property
    def matrix_shape(self) -> Shape:
        """The shape `(..., out, in)` of the weight as a matrix."""
        *stack, out, into = self.weight
        return (*stack, into, out) if self.transposed else self.weight

    @property
    def stack(self) -> Shape:
        """The shape of the stack of matrices, empty for a single one."""
        return self.matrix_shape[:-2]

    def shapes(self, r: int) -> tuple[Shape, Shape]:
        """Return the shapes of A and B for a rank."""
        *stack, out, into = self.matrix_shape
        return (*stack, r, into), (*stack, out, r)

    def matrix(self, weight: Tensor) -> Tensor:
        """Return a weight as `(..., out, in)`."""
        return weight.mT if self.transposed else weight

    def fold(self, matrix: Tensor) -> Tensor:
        """Return `(..., out, in)` as the host keeps its weight."""
        return matrix.mT if self.transposed else matrix

    def flat(self, factor: Tensor) -> Tensor:
        """Return a factor as the matrix that it is."""
        return factor

    def add(
        self, output: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0
    ) -> Tensor:
        """Return `output + scale · B A x`, with dropout of x."""
        return add_low_rank(output, x, a, b, scale, dropout)

    def along_output(self, vector: Tensor) -> Tensor:
        """Return a vector `(out,)` so that it multiplies the host's output."""
        return vector

    def initialise(self, a: Tensor, b: Tensor) -> None:
        """Fill A as in a fresh Linear layer and B with zeros: the change starts at nothing."""
        nn.init.kaiming_uniform_(a.flatten(0, -2), a=math.sqrt(5))
        nn.init.zeros_(b)


class Product(Delta, ABC):
    """A change `s · B A` of one weight; a subclass holds what A and B are made of."""

    additive = True

    def __init__(self, site: Site, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.site, self.scale = site, scale
        self.dropout = 0.0 if site.takes_ids else dropout

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A and B, of the site's shapes up to the rank."""

    def forward(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Return `output + s · B A x`."""
        x, dropout = first_input(args, kwargs), self.dropout if self.training else 0.0
        return self.site.add(output, x, *self.factors(), self.scale, dropout)

    def changed(self, weight: Tensor) -> Tensor:
        """Return the host's weight with the change, in its own dtype and in new storage."""
        a, b = (self.site.flat(factor).to(weight.dtype) for factor in self.factors())
        matrix, add = self.site.matrix(weight), torch.addmm if a.dim() == 2 else torch.baddbmm
        return self.site.fold(add(matrix, b, a, alpha=self.scale)).to(weight.dtype)

    def merge(self, module: nn.Module) -> None:
        """Fold the change into the host's weight, which gets new storage."""
        self.merge_into(module, "weight")

    def merge_into(self, module: nn.Module, name: str) -> None:
        """Fold the change into the parameter `name`, which gets new storage."""
        weight = module._parameters[name]
        if weight is None or not weight.is_floating_point():
            raise NotMergeable(f"The weight of {type(module).__name__} is quantised.")
        wide = weight.data.to(torch.promote_types(weight.dtype, torch.float32))
        weight.data = self.changed(wide).detach().to(weight.dtype).contiguous()


class LowRank(Product):
    """The product of two trained factors.

    Shapes: input `(..., in)`, `lora_A` `(r, in)`, `lora_B` `(out, r)`, output `(..., out)`; those
    of a convolution are `(r, in, *extent)` and `(out, r / groups, 1, ...)`, those of experts have
    one more dimension in front.
    """

    def __init__(
        self, site: Site, like: Tensor, r: int, scale: float, dropout: float = 0.0
    ) -> None:
        super().__init__(site, scale, dropout)
        self.lora_A, self.lora_B = fresh_factors(site, like, r)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start at nothing."""
        self.site.initialise(self.lora_A, self.lora_B)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A and B."""
        return self.lora_A, self.lora_B


def fresh(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Return an empty master copy, never narrower than float32, whatever the base is stored in."""
    return torch.empty(
        shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device
    )


def fresh_factors(site: Site, like: Tensor, r: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Return empty A and B of rank r, to be trained."""
    a, b = (nn.Parameter(fresh(like, shape)) for shape in site.shapes(r))
    return a, b


def check_rank(r: int, dropout: float = 0.0, alpha: float = 1.0) -> None:
    """Refuse a rank, a dropout or a strength that is out of its range.

    Raises:
        ConfigError: it is.
    """
    if r < 1:
        raise ConfigError(f"`r` must be at least 1, but is {r} instead.")
    if not 0 <= dropout < 1:
        raise ConfigError(f"`dropout` must lie in [0, 1), but is {dropout} instead.")
    check_finite(alpha=alpha)


def check_finite(**settings: float) -> None:
    """Refuse a strength that is NaN or infinite.

    Raises:
        ConfigError: one is.
    """
    for name, value in settings.items():
        if not abs(value) < math.inf:
            raise ConfigError(f"`{name}` must be finite, but is {value} instead.")
