"""BOFT. Without its CUDA kernel peft computes one butterfly factor, whatever the file says."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_peft.files.peft import on_weights
from lightning_peft.files.peft.settings import Settings
from lightning_peft.files.peft.spelling import Entry, Part, Spelling
from lightning_peft.method import Method
from lightning_peft.methods.boft import BOFT


class BOFTSpelling(Spelling):
    """Butterfly rotations."""

    peft_type = "BOFT"
    kinds = ("boft",)

    def config(self, part: Part) -> dict[str, Any]:
        """Return the settings of the method as peft spells them.

        Raises:
            Inexpressible: the layers have blocks of different sizes or numbers.
        """
        on_weights.require_hosts(part, on_weights.LINEAR)
        turns = [t for _, name, _, t in on_weights.own_tensors(part) if name == "boft_R"]
        return on_weights.hosts_config(part) | {
            "bias": "none",
            "boft_block_num": 0,
            "boft_block_size": on_weights.uniform(
                part, "block size", [len(t[0, 0]) for t in turns]
            ),
            "boft_dropout": 0.0,
            "boft_n_butterfly_factor": on_weights.uniform(
                part, "number of factors", [len(t) for t in turns]
            ),
            "fan_in_fan_out": False,
        }

    def method(self, settings: Settings, keys: Sequence[str], model: nn.Module) -> Method:
        """Return BOFT with the settings."""
        settings.lose("boft_dropout")
        if settings.take("boft_block_num", 0):
            raise settings.refusal("boft_block_num", "must be 0, and `boft_block_size` given")
        return BOFT(
            block_size=settings.take("boft_block_size", 4),
            factors=settings.take("boft_n_butterfly_factor", 1),
            targets=on_weights.targets_of(settings, model),
        )

    def entries(self, part: Part) -> list[Entry]:
        """Return the blocks and scales of each host."""
        return on_weights.entries_of(part)


SPELLING = BOFTSpelling()
