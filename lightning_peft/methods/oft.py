"""OFT: orthogonal fine-tuning (Qiu et al. 2023, https://arxiv.org/abs/2306.07280).

Applied to the input, as in the second paper (Qiu et al. 2025, https://arxiv.org/abs/2506.19847):

    y = W (Rᵀ x) + b,    R = diag(R₁, …, R_k),    Rᵢ = (I + Qᵢ)(I - Qᵢ)⁻¹,    Qᵢ = -Qᵢᵀ

The input of a layer is rotated block by block, so that the angles between its neurons stay what
they are. By default the first terms of the Neumann series stand for the inverse.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.delta import Delta
from lightning_peft.deltas.low_rank import Site
from lightning_peft.deltas.rotation import Rotation, find_rotatable
from lightning_peft.deltas.weight_delta import trained, weight_deltas
from lightning_peft.errors import ConfigError
from lightning_peft.method import Method
from lightning_peft.ops.orthogonal import cayley, cayley_series, multiply_blocks, nearest_divisor
from lightning_peft.structure.targets import Patterns, Targets


@dataclass(frozen=True, kw_only=True)
class OFT(Method):
    """Rotate the input of each target, block by block.

    Raises:
        ConfigError: a setting is out of its range.
    """

    kind: ClassVar[str] = "oft"

    block_size: int = 32
    """Width of a block; where it does not divide a layer's input, its nearest divisor is taken."""

    terms: int | None = 5
    """Terms of the Neumann series, at least 4; None inverts exactly, which is slower."""

    targets: Targets | Patterns | None = None
    """Which modules: None (the layers' linear projections), patterns, or "all-linear"."""

    layers: Sequence[int] | None = None
    """Indices of the layers to adapt (negative ones count from the top); None adapts all."""

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise ConfigError(f"`block_size` must be at least 2, but is {self.block_size} instead.")
        if self.terms is not None and self.terms < 4:
            raise ConfigError(f"`terms` must be at least 4 or None, but is {self.terms} instead.")

    def deltas(self, model: nn.Module) -> dict[str, Delta]:
        """Return a delta for each target."""
        hosts = find_rotatable(model, self.targets, self.layers)
        return weight_deltas(model, hosts, lambda site, like: Blocks(site, like, self))


class Blocks(Rotation):
    """The rotation of one host's input.

    Shapes: `oft_R` `(blocks, n (n - 1) / 2)`, the upper triangles of the Qᵢ, row by row.
    """

    def __init__(self, site: Site, like: Tensor, method: OFT) -> None:
        super().__init__(site, like)
        self.size, self.terms = nearest_divisor(self.width, method.block_size), method.terms
        self.oft_R = trained(like, self.width // self.size, self.size * (self.size - 1) // 2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Q is zero: nothing is turned yet."""
        nn.init.zeros_(self.oft_R)

    def blocks(self) -> Tensor:
        """Return all `Rᵢ - I`, `(blocks, n, n)`."""
        n, device = self.size, self.oft_R.device
        rows, columns = torch.triu_indices(n, n, 1, device=device)
        upper = self.oft_R.new_zeros(len(self.oft_R), n * n)
        upper = upper.index_copy(1, rows * n + columns, self.oft_R).view(-1, n, n)
        skew = upper - upper.mT
        # The signs of Q differ between the two, in the published implementation too.
        return cayley(skew) if self.terms is None else cayley_series(skew, self.terms)

    def turn(self, x: Tensor) -> Tensor:
        """Return `x R - x`."""
        return multiply_blocks(x, self.blocks())

    def change(self, weight: Tensor) -> Tensor:
        """Return `W Rᵀ - W`, `(out, in)`, without R as a whole."""
        blocks = self.blocks()
        return multiply_blocks(weight.to(blocks.dtype), blocks.mT)
