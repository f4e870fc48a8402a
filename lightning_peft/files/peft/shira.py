"""SHiRA. peft writes the places of the entries; ours come from a seed, and the two must agree."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_peft.files.peft import on_weights
from lightning_peft.files.peft.settings import Settings
from lightning_peft.files.peft.spelling import BASE, Entry, Inexpressible, Part, Spelling, constant
from lightning_peft.method import Method
from lightning_peft.methods.shira import SHiRA, Sparse


class SHiRASpelling(Spelling):
    """A few entries of each weight."""

    peft_type = "SHIRA"
    kinds = ("shira",)

    def config(self, part: Part) -> dict[str, Any]:
        """Return the settings of the method as peft spells them.

        Raises:
            Inexpressible: the change is scaled, or a layer has fewer entries than `r` asks for.
        """
        on_weights.require_hosts(part, on_weights.LINEAR)
        method = cast(SHiRA, part.method)
        if method.scale != 1:
            raise Inexpressible("peft's SHiRA has no `scale`.")
        for _, delta in _deltas(part):
            if len(delta.shira_weight) < method.r * (delta.height + delta.width):
                raise Inexpressible("peft's SHiRA cannot train all entries of a layer.")
        return on_weights.hosts_config(part) | {
            "fan_in_fan_out": False,
            "mask_type": "random",
            "r": method.r,
            "random_seed": method.seed,
        }

    def method(self, settings: Settings, keys: Sequence[str], model: nn.Module) -> Method:
        """Return SHiRA with the settings."""
        if settings.take("mask_type", "random") != "random":
            raise settings.refusal("mask_type", "must be random")
        seed = settings.any_of("random_seed", int)
        if seed is None:
            raise settings.refusal(
                "random_seed", "must be a number, since places are drawn from it anew"
            )
        return SHiRA(
            r=settings.take("r", 32), seed=seed, targets=on_weights.targets_of(settings, model)
        )

    def entries(self, part: Part) -> list[Entry]:
        """Return the entries of each host, and their places."""
        why = "its seed gives here"
        return on_weights.entries_of(part) + [
            constant(f"{BASE}{host}.shira_indices", lambda delta=delta: _indices(delta), why)  # type: ignore[misc]
            for host, delta in _deltas(part)
        ]


def _deltas(part: Part) -> list[tuple[str, Sparse]]:
    every = ((host, m) for host, d in part.deltas.items() for m in d.modules())
    return [(host, m) for host, m in every if isinstance(m, Sparse)]


def _indices(delta: Sparse) -> Tensor:
    """Return rows and columns, `(2, entries)`."""
    places = delta.places
    return torch.stack([places // delta.width, places % delta.width]).to(torch.int32)


SPELLING = SHiRASpelling()
