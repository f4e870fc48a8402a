"""How a product of two small factors acts beside each kind of host but a plain linear layer."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.delta import NotMergeable
from lightning_peft.deltas.low_rank import Shape, Site
from lightning_peft.errors import AdapterError, ConfigError


@dataclass(frozen=True)
class Table(Site):
    """An embedding table `(vocabulary, d_model)`; its input are ids."""

    takes_ids: ClassVar[bool] = True
    padding_idx: int | None = None
    output_scale: float = 1.0
    """Some tables (BART, Gemma) multiply their rows."""

    def add(
        self, output: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0
    ) -> Tensor:
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

    def add(
        self, output: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0
    ) -> Tensor:
        """Return `output + scale · B * (A * x)`, with dropout of x."""
        x, padding = F.dropout(x, dropout), self.padding
        if self.mode != "zeros":
            x, padding = F.pad(x, self.edges, mode=self.mode), 0
        convolve = F.conv1d if a.dim() == 3 else F.conv2d
        hidden = convolve(x, a.to(x.dtype), None, self.stride, padding, self.dilation)
        change: Tensor = convolve(hidden, b.to(x.dtype), groups=self.groups) * scale
        return output + change.to(output.dtype)

    def along_output(self, vector: Tensor) -> Tensor:
        """Return a vector `(out,)` so that it multiplies the host's output."""
        return vector.view(-1, *(1 for _ in self.weight[2:]))


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
