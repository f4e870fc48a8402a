"""FourierFT: a weight's change as a sparse spectrum (Gao 2024, https://arxiv.org/abs/2405.03003).

    y = W x + b + s · Re(F⁻¹(S)) x,    S ∈ R^(out × in) with n entries that are not zero

F is the discrete Fourier transform in two dimensions. The frequencies are drawn once, from a seed,
and the same for all layers of one shape; only their n coefficients are trained.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.delta import Delta
from lightning_peft.deltas.hosts import find_hosts
from lightning_peft.deltas.low_rank import Site, check_finite
from lightning_peft.deltas.weight_delta import (
    DenseDelta,
    DerivedDelta,
    shared,
    trained,
    weight_deltas,
)
from lightning_peft.errors import ConfigError
from lightning_peft.method import Method
from lightning_peft.structure.targets import Patterns, Targets


@dataclass(frozen=True, kw_only=True)
class FourierFT(Method):
    """Train a few coefficients of the Fourier transform of each change.

    Raises:
        ConfigError: a setting is out of its range.
    """

    kind: ClassVar[str] = "fourierft"

    frequencies: int = 1000
    """How many coefficients a layer trains, or all of a smaller weight."""

    scale: float = 150.0
    """Factor of the change; large, since the inverse transform divides by the weight's size."""

    seed: int = 777
    """Seed of the frequencies; all that is stored of them."""

    targets: Targets | Patterns | None = None
    """Which modules: None (the layers' linear projections), patterns, or "all-linear"."""

    layers: Sequence[int] | None = None
    """Indices of the layers to adapt (negative ones count from the top); None adapts all."""

    def __post_init__(self) -> None:
        check_finite(scale=self.scale)
        if self.frequencies < 1:
            raise ConfigError(
                f"`frequencies` must be at least 1, but is {self.frequencies} instead."
            )
        if not self.scale:
            raise ConfigError("`scale` must not be 0, or nothing would ever change.")

    def deltas(self, model: nn.Module) -> dict[str, Delta]:
        """Return a delta for each target."""
        hosts = find_hosts(model, self.targets, self.layers)
        return weight_deltas(model, hosts, lambda site, like: Spectrum(site, like, self))


class Spectrum(DenseDelta, DerivedDelta):
    """The change of one host.

    Shapes: `fourierft_spectrum` `(n,)`; `places` `(n,)`, indices into the spectrum `(out, in)` row
    by row, which all hosts of one shape share.
    """

    constants = ("places",)
    places: Tensor

    def __init__(self, site: Site, like: Tensor, method: FourierFT) -> None:
        super().__init__(site, like)
        self.seed, self.scale = method.seed, method.scale
        count = min(method.frequencies, self.height * self.width)
        self.fourierft_spectrum = trained(like, count)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All coefficients are zero: the change starts at nothing."""
        nn.init.zeros_(self.fourierft_spectrum)
        self.settle()

    def derive(self, device: torch.device) -> Mapping[str, Tensor]:
        """Return the places of the frequencies."""
        key = (self.seed, self.height * self.width, len(self.fourierft_spectrum))
        return {"places": shared(_places, *key, device=device)}

    def change(self, weight: Tensor) -> Tensor:
        """Return `s · Re(F⁻¹(S))`, `(out, in)`."""
        spectrum = self.fourierft_spectrum
        flat = spectrum.new_zeros(self.height * self.width).scatter(0, self.places, spectrum)
        return torch.fft.ifft2(flat.view(self.height, self.width)).real * self.scale


def _places(seed: int, size: int, count: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randperm(size, generator=generator, device="cpu")[:count]
