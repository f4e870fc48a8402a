"""MiSS, in its one variant with a matrix for the sum of the shards."""

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from lightning_peft.files.peft import on_weights
from lightning_peft.files.peft.settings import Settings
from lightning_peft.files.peft.spelling import Entry, Part, Spelling
from lightning_peft.method import Method
from lightning_peft.methods.miss import MiSS


class MiSSSpelling(Spelling):
    """One matrix for the sum of the input's shards."""

    peft_type = "MISS"
    kinds = ("miss",)

    def config(self, part: Part) -> dict[str, Any]:
        """Return the settings of the method as peft spells them.

        Raises:
            Inexpressible: layers narrower than `r` have shards of another width.
        """
        on_weights.require_hosts(part, on_weights.LINEAR)
        blocks = [tensor for *_, tensor in on_weights.own_tensors(part)]
        return on_weights.hosts_config(part) | {
            "bias": "none",
            "mini_r": 1,
            "miss_dropout": cast(MiSS, part.method).dropout,
            "r": on_weights.uniform(part, "rank", [len(block) for block in blocks]),
        }

    def method(self, settings: Settings, keys: Sequence[str], model: nn.Module) -> Method:
        """Return MiSS with the settings."""
        if settings.peek("init_weights") not in (None, True, False):
            raise settings.refusal("init_weights", "must be true, as other variants are unknown")
        settings.ignore("mini_r")  # of another variant
        return MiSS(
            r=settings.take("r", 64),
            dropout=settings.take("miss_dropout", 0.0),
            targets=on_weights.targets_of(settings, model),
        )

    def entries(self, part: Part) -> list[Entry]:
        """Return the matrix of each host."""
        return on_weights.entries_of(part)


SPELLING = MiSSSpelling()
