"""LoHa."""

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from lightning_peft.files.peft import on_weights
from lightning_peft.files.peft.settings import Settings
from lightning_peft.files.peft.spelling import Entry, Part, Spelling
from lightning_peft.method import Method
from lightning_peft.methods.loha import LoHa


class LoHaSpelling(Spelling):
    """Elementwise products of two low-rank matrices."""

    peft_type = "LOHA"
    kinds = ("loha",)

    def config(self, part: Part) -> dict[str, Any]:
        """Return the settings of the method as peft spells them."""
        on_weights.require_hosts(part, on_weights.LINEAR + on_weights.CONVOLUTIONS)
        method = cast(LoHa, part.method)
        return on_weights.hosts_config(part) | {
            "alpha": method.alpha,
            "alpha_pattern": {},
            "module_dropout": 0.0,
            "r": method.r,
            "rank_dropout": 0.0,
            "rank_pattern": {},
            "use_effective_conv2d": False,
        }

    def method(self, settings: Settings, keys: Sequence[str], model: nn.Module) -> Method:
        """Return LoHa with the settings."""
        settings.lose("rank_dropout", "module_dropout")
        return LoHa(
            r=settings.take("r", 8),
            alpha=settings.take("alpha", 8.0),
            targets=on_weights.targets_of(settings, model),
        )

    def entries(self, part: Part) -> list[Entry]:
        """Return the four factors of each host."""
        return on_weights.entries_of(part)


SPELLING = LoHaSpelling()
