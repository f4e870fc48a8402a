"""LoKr."""

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from lightning_peft.files.peft import on_weights
from lightning_peft.files.peft.settings import Settings
from lightning_peft.files.peft.spelling import Entry, Part, Spelling
from lightning_peft.method import Method
from lightning_peft.methods.lokr import LoKr


class LoKrSpelling(Spelling):
    """Kronecker products."""

    peft_type = "LOKR"
    kinds = ("lokr",)

    def config(self, part: Part) -> dict[str, Any]:
        """Return the settings of the method as peft spells them."""
        on_weights.require_hosts(part, on_weights.LINEAR + on_weights.CONVOLUTIONS)
        method = cast(LoKr, part.method)
        return on_weights.hosts_config(part) | {
            "alpha": method.alpha,
            "alpha_pattern": {},
            "decompose_both": method.decompose_both,
            "decompose_factor": -1 if method.factor is None else method.factor,
            "module_dropout": 0.0,
            "r": method.r,
            "rank_dropout": 0.0,
            "rank_dropout_scale": False,
            "rank_pattern": {},
            "use_effective_conv2d": False,
        }

    def method(self, settings: Settings, keys: Sequence[str], model: nn.Module) -> Method:
        """Return LoKr with the settings."""
        settings.lose("rank_dropout", "module_dropout")
        settings.ignore("rank_dropout_scale")
        factor = settings.take("decompose_factor", -1)
        return LoKr(
            r=settings.take("r", 8),
            alpha=settings.take("alpha", 8.0),
            factor=None if factor == -1 else factor,
            decompose_both=settings.take("decompose_both", False),
            targets=on_weights.targets_of(settings, model),
        )

    def entries(self, part: Part) -> list[Entry]:
        """Return the factors of each host."""
        return on_weights.entries_of(part)


SPELLING = LoKrSpelling()
