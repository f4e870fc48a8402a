"""BOFT: orthogonal butterfly fine-tuning (Liu et al. 2024, https://arxiv.org/abs/2311.06243).

    y = s ⊙ W (Rᵀ x) + b,    R = B_m … B₂ B₁,    Bᵢ = Pᵢ diag(Rᵢ₁, …, Rᵢ_k) Pᵢᵀ

Each factor is a block-diagonal rotation of a permuted input, as in a fast Fourier transform: after
m factors every input reaches 2^(m - 1) blocks. Each output is scaled by a trained s besides. With
one factor it is OFT with that scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.delta import Delta
from lightning_peft.deltas.low_rank import Site
from lightning_peft.deltas.rotation import Rotation, find_rotatable
from lightning_peft.deltas.weight_delta import trained, weight_deltas
from lightning_peft.errors import ConfigError
from lightning_peft.method import Method
from lightning_peft.ops.orthogonal import cayley, multiply_blocks, nearest_divisor
from lightning_peft.structure.anatomy import is_linear
from lightning_peft.structure.targets import Patterns, Targets


@dataclass(frozen=True, kw_only=True)
class BOFT(Method):
    """Rotate the input of each target by a product of butterfly factors, and scale its output.

    Raises:
        ConfigError: a setting is out of its range.
    """

    kind: ClassVar[str] = "boft"

    block_size: int = 8
    """Width of a block; where it does not divide a layer's input, its nearest divisor is taken."""

    factors: int = 2
    """Number of butterfly factors m; fewer where a layer's input is no multiple of 2^(m-1) blocks
    of even size."""

    targets: Targets | Patterns | None = None
    """Which modules: None (the layers' linear projections), patterns, or "all-linear"."""

    layers: Sequence[int] | None = None
    """Indices of the layers to adapt (negative ones count from the top); None adapts all."""

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise ConfigError(f"`block_size` must be at least 2, but is {self.block_size} instead.")
        if self.factors < 1:
            raise ConfigError(f"`factors` must be at least 1, but is {self.factors} instead.")

    def deltas(self, model: nn.Module) -> dict[str, Delta]:
        """Return a delta for each target."""
        hosts = find_rotatable(model, self.targets, self.layers)
        return weight_deltas(model, hosts, lambda site, like: Butterfly(site, like, self))


class Butterfly(Rotation):
    """The rotation of one host's input, and the scale of its output.

    Shapes: `boft_R` `(m, blocks, n, n)`, whose skew-symmetric parts are the Q of Cayley's
    transform; `boft_s` `(out, 1)`.
    """

    merges_scaled = False  # a part of two factors is not that part of their product

    def __init__(self, site: Site, like: Tensor, method: BOFT) -> None:
        super().__init__(site, like)
        size = nearest_divisor(self.width, method.block_size)
        shape = (_most_factors(self.width, size, method.factors), self.width // size, size, size)
        self.boft_R = trained(like, *shape)
        self.boft_s = trained(like, self.height, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Nothing is turned yet, and the scale is one."""
        nn.init.zeros_(self.boft_R)
        nn.init.ones_(self.boft_s)

    def turn(self, x: Tensor) -> Tensor:
        """Return `x R - x`."""
        turned = x
        blocks = cayley((self.boft_R - self.boft_R.mT) / 2)
        for i in reversed(range(len(blocks))):
            added = multiply_blocks(_shuffle(turned, blocks.shape[-1], i, back=True), blocks[i])
            turned = turned + _shuffle(added, blocks.shape[-1], i)
        return turned - x

    def forward(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Return the output, scaled but for its bias."""
        if not is_linear(host):
            return super().forward(host, args, kwargs, output)
        bias, gain = host._parameters.get("bias"), (self.boft_s.squeeze(1) - 1).to(output.dtype)
        shift = None if bias is None else gain * bias.to(output.dtype)
        if output.is_nested:  # what `nn.TransformerEncoder` makes of a padded batch in eval mode
            shift = None if shift is None else -shift
            return output + F.linear(output, torch.diag(gain), shift)
        added = output * gain
        return output + (added if shift is None else added - shift)

    def change(self, weight: Tensor) -> Tensor:
        """Return `s ⊙ W Rᵀ - W`, `(out, in)`."""
        return self.boft_s * (weight + super().change(weight)) - weight


def _most_factors(width: int, size: int, wanted: int) -> int:
    fitting = [m for m in range(2, wanted + 1) if size % 2 == 0 and width % (size << (m - 1)) == 0]
    return max(fitting, default=1)


def _shuffle(x: Tensor, size: int, factor: int, *, back: bool = False) -> Tensor:
    """Return `x`, `(..., in)`, with the even half blocks of a group before its odd ones.

    A group of factor i is 2^i blocks wide.
    """
    if not factor:
        return x
    pair = (2, 1 << factor) if back else (1 << factor, 2)
    return x.unflatten(-1, (-1, *pair, size // 2)).transpose(-3, -2).flatten(-4)
