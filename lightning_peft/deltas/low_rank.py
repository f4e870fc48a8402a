"""Changes of a weight by a product of two small factors, on every kind of module that holds one.

    ΔW = s · B A,    A ∈ R^(r × in),  B ∈ R^(out × r)

A `Site` knows how such a product acts beside one kind of host; a `Product` is a delta that says
what its factors are made of. So a method of LoRA's family states its own arithmetic alone.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.delta import Delta, NotMergeable
from lightning_peft.errors import AdapterError, ConfigError, TargetError, near_misses
from lightning_peft.ops.low_rank import add_low_rank
from lightning_peft.structure import anatomy
from lightning_peft.structure.targets import Fits, Patterns, Targets, as_targets, matches

ADAPTABLE = "Linear, Conv1D, Embedding, Conv1d, Conv2d, MultiheadAttention and fused experts"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Site:
    """A weight of shape `(out, in)`, or a stack of such, and how a product acts beside it."""

    weight: Shape
    """Shape of the weight as its host keeps it."""

    transposed: bool = False
    """Whether the host keeps it as `(in, out)`."""

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

    def add(self, output: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """Return `output + scale · B A x`."""
        return add_low_rank(output, x, a, b, scale)

    def along_output(self, vector: Tensor) -> Tensor:
        """Return a vector `(out,)` so that it multiplies the host's output."""
        return vector

    def initialise(self, a: Tensor, b: Tensor) -> None:
        """Fill A as in a fresh Linear layer and B with zeros: the change starts at nothing."""
        nn.init.kaiming_uniform_(a.flatten(0, -2), a=math.sqrt(5))
        nn.init.zeros_(b)


@dataclass(frozen=True)
class Table(Site):
    """An embedding table `(vocabulary, d_model)`; its input are ids."""

    padding_idx: int | None = None
    output_scale: float = 1.0
    """Some tables (BART, Gemma) multiply their rows."""

    def add(self, output: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """Return `output + scale · B A[ids]`."""
        change = F.linear(F.embedding(x, a.T, self.padding_idx), b) * (scale * self.output_scale)
        return output + change.to(output.dtype)

    def initialise(self, a: Tensor, b: Tensor) -> None:
        """Fill A with zeros and B at random, as peft has it for tables."""
        nn.init.zeros_(a)
        nn.init.normal_(b)


@dataclass(frozen=True)
class Kernel(Site):
    """A convolution's `(out, in / groups, *extent)`: one to r channels, then one of extent 1."""

    stride: Shape = ()
    padding: Any = 0
    dilation: Shape = ()
    groups: int = 1
    mode: str = "zeros"
    edges: Shape = ()
    rank_dims: ClassVar[tuple[int, int]] = (0, 1)

    @property
    def matrix_shape(self) -> Shape:
        """The shape `(out, in · extent)` of the kernel as a matrix."""
        out, *rest = self.weight
        return out, math.prod(rest)

    def shapes(self, r: int) -> tuple[Shape, Shape]:
        """Return the shapes of A and B for a rank.

        Raises:
            ConfigError: the rank is not divisible by the groups.
        """
        if r % self.groups:
            raise ConfigError(f"`r` must be divisible by {self.groups} groups, but is {r} instead.")
        out, into, *extent = self.weight
        return (r, into * self.groups, *extent), (out, r // self.groups, *(1 for _ in extent))

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the kernel as `(out, in · extent)`.

        Raises:
            NotMergeable: the host convolves in groups, the change does not.
        """
        if self.groups > 1:
            raise NotMergeable(f"A convolution in {self.groups} groups cannot hold the change.")
        return weight.flatten(1)

    def fold(self, matrix: Tensor) -> Tensor:
        """Return `(out, in · extent)` as a kernel."""
        return matrix.view(self.weight)

    def flat(self, factor: Tensor) -> Tensor:
        """Return a factor as the matrix that it is."""
        return factor.flatten(1)

    def add(self, output: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """Return `output + scale · B * (A * x)`."""
        padding = self.padding
        if self.mode != "zeros":
            x, padding = F.pad(x, self.edges, mode=self.mode), 0
        convolve = F.conv1d if a.dim() == 3 else F.conv2d
        hidden = convolve(x, a.to(x.dtype), None, self.stride, padding, self.dilation)
        change: Tensor = convolve(hidden, b.to(x.dtype), groups=self.groups) * scale
        return output + change.to(output.dtype)

    def along_output(self, vector: Tensor) -> Tensor:
        """Return a vector `(out,)` so that it multiplies the host's output."""
        return vector.view(-1, *(1 for _ in self.weight[2:]))


class Product(Delta, ABC):
    """A change `s · B A` of one weight; a subclass holds what A and B are made of."""

    additive = True

    def __init__(self, site: Site, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.site, self.scale = site, scale
        drops = dropout and not isinstance(site, Table)  # ids cannot be dropped
        self.dropout = nn.Dropout(dropout) if drops else None

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A and B, of the site's shapes up to the rank."""

    def forward(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Return `output + s · B A x`."""
        return self.site.add(output, self.received(args, kwargs), *self.factors(), self.scale)

    def received(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the host's input, with dropout in training."""
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        return self.dropout(x) if self.dropout else x

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


class Departure(Product):
    """How far a product of two trained factors has come from what it was at its start.

        ΔW = s · (B A − B₀ A₀) = s · ((B − B₀) A + B₀ (A − A₀))

    The base stays what it is, and so does its output at the start, bitwise. The start is kept with
    the adapter: a decomposition may come out otherwise on another machine.

    Args:
        site: where the product acts.
        start: A₀ `(r, in)` and B₀ `(out, r)`; their rank may be lower than `r`.
        r: the rank.
        scale: factor s of the product.
        dropout: probability with which an input is zeroed in training.
    """

    start_a: Tensor
    start_b: Tensor

    def __init__(
        self, site: Site, start: tuple[Tensor, Tensor], r: int, scale: float, dropout: float = 0.0
    ) -> None:
        super().__init__(site, scale, dropout)
        self.lora_A, self.lora_B = fresh_factors(site, start[0], r)
        missing = r - start[0].shape[-2]
        a, b = F.pad(start[0], (0, 0, 0, missing)), F.pad(start[1], (0, missing))
        self.register_buffer("start_a", a.reshape(self.lora_A.shape).contiguous())
        self.register_buffer("start_b", b.reshape(self.lora_B.shape).contiguous())
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Go back to the start."""
        self.lora_A.copy_(self.start_a)
        self.lora_B.copy_(self.start_b)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return `[A; A − A₀]` and `[B − B₀, B₀]`, of rank 2r: exactly nothing at the start."""
        rows, columns = self.site.rank_dims
        a = torch.cat([self.lora_A, self.lora_A - self.start_a], rows)
        return a, torch.cat([self.lora_B - self.start_b, self.start_b], columns)


class Parts(Delta):
    """Changes of weights that are read as tensors: of fused experts, of `MultiheadAttention`."""

    def __init__(self, parts: Mapping[str, Product]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.additive = all(part.additive for part in parts.values())

    def reweigh(self, host: nn.Module, name: str, weight: Tensor) -> Tensor:
        """Return a weight with its change."""
        part: Any = self._modules.get(name)
        return weight if part is None else part.changed(weight)

    def merge(self, module: nn.Module) -> None:
        """Fold each change into its weight."""
        for name, part in self.named_children():
            part.merge_into(module, name)  # type: ignore[operator]


def can_adapt(module: nn.Module) -> bool:
    """Whether a product can change a weight of the module."""
    called = anatomy.is_linear(module) or isinstance(module, nn.Embedding | nn.Conv1d | nn.Conv2d)
    return called or bool(anatomy.read_weights(module))


def deltas_for(
    model: nn.Module,
    hosts: Mapping[str, nn.Module],
    make: Callable[[str, Site, Tensor], Product],
) -> dict[str, Delta]:
    """Return a delta for each of `hosts`, whose products `make` builds.

    Args:
        model: which holds the hosts.
        hosts: by their names in the model.
        make: takes a host's name, a site and the weight there.
    """
    read = anatomy.read_by_parents(model)
    return {
        name: _delta_for(host, functools.partial(make, name), name in read)
        for name, host in hosts.items()
    }


def _delta_for(host: Any, make: Callable[[Site, Tensor], Product], read: bool) -> Delta:
    names = ["weight"] if read else anatomy.read_weights(host)
    if not names:
        return make(site_of(host), host.weight)
    turned = getattr(host, "is_transposed", False)
    weights: dict[str, Tensor] = {name: host._parameters[name] for name in names}
    return Parts({n: make(Site(tuple(w.shape), turned), w) for n, w in weights.items()})


def site_of(host: Any) -> Site:
    """Return how a product acts beside a host that is called."""
    if isinstance(host, nn.Linear):
        return Site((host.out_features, host.in_features))  # a quantised weight is packed
    if isinstance(host, nn.Embedding):
        scale = float(getattr(host, "embed_scale", None) or 1.0)
        return Table(tuple(host.weight.shape), True, host.padding_idx, scale)
    if isinstance(host, nn.Conv1d | nn.Conv2d):
        return Kernel(
            tuple(host.weight.shape), False, host.stride, host.padding, host.dilation, host.groups,
            host.padding_mode, tuple(host._reversed_padding_repeated_twice),
        )  # fmt: skip
    return Site(tuple(host.weight.shape), transposed=True)


def values_of(site: Site, weight: Tensor, method: str) -> Tensor:
    """Return a weight as `(..., out, in)` in full precision, for a method to start from.

    Raises:
        AdapterError: it has no values yet.
    """
    if weight.is_meta:
        raise AdapterError(
            f"{method} starts from the values of the weights, but the model is on the meta device: "
            "fill the model first, then inject."
        )
    matrix = site.matrix(weight.detach())
    return matrix.to(torch.promote_types(weight.dtype, torch.float32))


def fresh(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Return an empty master copy, never narrower than float32, whatever the base is stored in."""
    return torch.empty(
        shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device
    )


def is_whole(module: nn.Module) -> bool:
    """Whether a product can change the module, which is no convolution in groups."""
    return can_adapt(module) and getattr(module, "groups", 1) == 1


def has_matrix(module: nn.Module) -> bool:
    """Whether a product can change the module and its weights are matrices of plain numbers."""
    weights = [p for p in module._parameters.values() if p is not None and p.dim() > 1]
    plain = all(weight.is_floating_point() for weight in weights) and bool(weights)
    return is_whole(module) and plain


_BESIDES: dict[Fits, str] = {
    is_whole: ", not in groups",
    has_matrix: ", neither quantised nor in groups",
}
"""What a method asks of its hosts besides, in words."""


def fresh_factors(site: Site, like: Tensor, r: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Return empty A and B of rank r, to be trained."""
    a, b = (nn.Parameter(fresh(like, shape)) for shape in site.shapes(r))
    return a, b


def find_hosts(
    model: nn.Module,
    targets: Targets | Patterns | None,
    layers: Sequence[int] | None,
    fits: Fits = can_adapt,
) -> dict[str, nn.Module]:
    """Return the modules that a method of the family changes, by name."""
    return as_targets(targets, layers).find(model, fits, ADAPTABLE + _BESIDES.get(fits, ""))


def check_rank(r: int, dropout: float = 0.0) -> None:
    """Refuse a rank or a dropout that is out of its range.

    Raises:
        ConfigError: it is.
    """
    if r < 1:
        raise ConfigError(f"`r` must be at least 1, but is {r} instead.")
    if not 0 <= dropout < 1:
        raise ConfigError(f"`dropout` must lie in [0, 1), but is {dropout} instead.")


def check_patterns(patterns: Sequence[str], hosts: Mapping[str, nn.Module], method: str) -> None:
    """Refuse a pattern that matches none of the hosts.

    Raises:
        TargetError: it matches none; near misses are named.
    """
    for pattern in patterns:
        if not any(matches(pattern, name) for name in hosts):
            close = near_misses(pattern, {name.rpartition(".")[2] for name in hosts})
            raise TargetError(f"`{pattern}` in a pattern of {method} matches no target.{close}")


def first_match(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return the value of the first pattern that matches, or the default."""
    return next((value for p, value in patterns.items() if matches(p, name)), default)
