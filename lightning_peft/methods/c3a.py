"""C3A: circular convolution adaptation (Chen et al. 2025, https://arxiv.org/abs/2407.19342).

    y = W x + b + C x / in,    C ∈ R^(out × in) of circulant blocks c_ij ∈ R^n

Each block is one vector in all its rotations, so that its product with a part of the input is a
circular correlation: y_i = Σ_j F⁻¹(conj(F c_ij) ⊙ F x_j). The rank is not limited.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.delta import Delta
from lightning_peft.deltas.hosts import find_hosts
from lightning_peft.deltas.low_rank import Site
from lightning_peft.deltas.weight_delta import WeightDelta, trained, weight_deltas
from lightning_peft.errors import ConfigError
from lightning_peft.method import Method
from lightning_peft.structure.targets import Patterns, Targets


@dataclass(frozen=True, kw_only=True)
class C3A(Method):
    """A change of circulant blocks.

    Raises:
        ConfigError: a setting is out of its range.
    """

    kind: ClassVar[str] = "c3a"

    block_size: int = 256
    """Width of a block, at most: the largest common divisor of a layer's two widths is taken that
    is not wider."""

    targets: Targets | Patterns | None = None
    """Which modules: None (the layers' linear projections), patterns, or "all-linear"."""

    layers: Sequence[int] | None = None
    """Indices of the layers to adapt (negative ones count from the top); None adapts all."""

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ConfigError(f"`block_size` must be at least 1, but is {self.block_size} instead.")

    def deltas(self, model: nn.Module) -> dict[str, Delta]:
        """Return a delta for each target."""
        hosts = find_hosts(model, self.targets, self.layers)
        return weight_deltas(
            model, hosts, lambda site, like: Circulant(site, like, self.block_size)
        )


class Circulant(WeightDelta):
    """The change of one host.

    Shapes: `c3a_kernel` `(out / n, in / n, n)`.
    """

    def __init__(self, site: Site, like: Tensor, block_size: int) -> None:
        super().__init__(site, like)
        common = math.gcd(self.height, self.width)
        n = max(n for n in range(1, min(block_size, common) + 1) if common % n == 0)
        self.c3a_kernel = trained(like, self.height // n, self.width // n, n)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All blocks are zero: the change starts at nothing."""
        nn.init.zeros_(self.c3a_kernel)

    def change(self, weight: Tensor) -> Tensor:
        """Return `C / in`, `(out, in)`."""
        n = self.c3a_kernel.shape[-1]
        steps = torch.arange(n, device=self.c3a_kernel.device)
        blocks = self.c3a_kernel[..., (steps - steps[:, None]) % n]
        return blocks.transpose(1, 2).reshape(self.height, self.width) / self.width

    def add(self, weight: Tensor, x: Tensor, output: Tensor) -> Tensor:
        """Return `output + C x / in`."""
        n = self.c3a_kernel.shape[-1]
        if n == 1 or not x.numel():  # not every library transforms nothing
            return super().add(weight, x, output)
        kernel = torch.fft.rfft(self.c3a_kernel / self.width)
        parts = torch.fft.rfft(x.to(self.c3a_kernel.dtype).unflatten(-1, (-1, n)))
        product = torch.einsum("...jf,ijf->...if", parts, kernel.conj())
        return output + torch.fft.irfft(product, n).flatten(-2).to(output.dtype)
