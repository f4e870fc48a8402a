"""FourierFT; frequencies are drawn from the same seed on both sides."""

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from lightning_peft.files.peft import names, on_weights
from lightning_peft.files.peft.settings import Settings
from lightning_peft.files.peft.spelling import Entry, Part, Spelling
from lightning_peft.method import Method
from lightning_peft.methods.fourierft import FourierFT


class FourierFTSpelling(Spelling):
    """A few coefficients of each change's Fourier transform."""

    peft_type = "FOURIERFT"
    kinds = ("fourierft",)

    def config(self, part: Part) -> dict[str, Any]:
        """Return the settings of the method as peft spells them."""
        on_weights.require_hosts(part, on_weights.LINEAR)
        method = cast(FourierFT, part.method)
        counts = {host: len(tensor) for host, _, _, tensor in on_weights.own_tensors(part)}
        return on_weights.hosts_config(part) | {
            "bias": "none",
            "fan_in_fan_out": False,
            "n_frequency": method.frequencies,
            "n_frequency_pattern": names.deviating(counts, method.frequencies),
            "random_loc_seed": method.seed,
            "scaling": method.scale,
        }

    def method(self, settings: Settings, keys: Sequence[str], model: nn.Module) -> Method:
        """Return FourierFT with the settings."""
        settings.ignore("n_frequency_pattern")  # the shapes show whether it is as ours
        return FourierFT(
            frequencies=settings.take("n_frequency", 1000),
            scale=settings.take("scaling", 150.0),
            seed=settings.take("random_loc_seed", 777),
            targets=on_weights.targets_of(settings, model),
        )

    def entries(self, part: Part) -> list[Entry]:
        """Return the coefficients of each host."""
        return on_weights.entries_of(part)


SPELLING = FourierFTSpelling()
