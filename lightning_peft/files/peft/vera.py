"""VeRA. Of the random matrices the seed is written; where peft wrote them they are compared."""

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from lightning_peft.files.peft import on_weights
from lightning_peft.files.peft.settings import Settings
from lightning_peft.files.peft.spelling import Entry, Part, Spelling, constant
from lightning_peft.method import Method
from lightning_peft.methods.vera import VeRA


class VeRASpelling(Spelling):
    """Diagonals around shared random matrices."""

    peft_type = "VERA"
    kinds = ("vera",)

    def config(self, part: Part) -> dict[str, Any]:
        """Return the settings of the method as peft spells them."""
        on_weights.require_hosts(part, on_weights.LINEAR_AND_CONV1D)
        method = cast(VeRA, part.method)
        return on_weights.hosts_config(part) | {
            "bias": "none",
            "d_initial": method.d_initial,
            "fan_in_fan_out": on_weights.turned(part),
            "projection_prng_key": method.seed,
            "r": method.r,
            "save_projection": False,
            "vera_dropout": method.dropout,
        }

    def method(self, settings: Settings, keys: Sequence[str], model: nn.Module) -> Method:
        """Return VeRA with the settings."""
        settings.take("save_projection", True)
        return VeRA(
            r=settings.take("r", 256),
            d_initial=settings.take("d_initial", 0.1),
            dropout=settings.take("vera_dropout", 0.0),
            seed=settings.take("projection_prng_key", 0),
            targets=on_weights.targets_of(settings, model),
        )

    def entries(self, part: Part) -> list[Entry]:
        """Return the diagonals, and the shared matrices that a file may hold."""
        deltas = [m for d in part.deltas.values() for m in d.modules() if hasattr(m, "down")]
        why = "its seed gives here: the file was made by another random generator"
        first: Any = deltas[0]
        return [
            *on_weights.entries_of(part),
            constant("base_model.vera_A", lambda: first.down, why, optional=True),
            constant("base_model.vera_B", lambda: first.up, why, optional=True),
        ]


SPELLING = VeRASpelling()
