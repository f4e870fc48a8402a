"""OFT, as peft has it since it turns inputs."""

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from lightning_peft.files.peft import on_weights
from lightning_peft.files.peft.settings import Settings
from lightning_peft.files.peft.spelling import Entry, Part, Spelling
from lightning_peft.method import Method
from lightning_peft.methods.oft import OFT


class OFTSpelling(Spelling):
    """Rotations of inputs, block by block."""

    peft_type = "OFT"
    kinds = ("oft",)

    def config(self, part: Part) -> dict[str, Any]:
        """Return the settings of the method as peft spells them."""
        on_weights.require_hosts(part, on_weights.LINEAR)
        method = cast(OFT, part.method)
        return on_weights.hosts_config(part) | {
            "bias": "none",
            "block_share": False,
            "coft": False,
            "fan_in_fan_out": False,
            "module_dropout": 0.0,
            "num_cayley_neumann_terms": 5 if method.terms is None else method.terms,
            "oft_block_size": method.block_size,
            "r": 0,
            "use_cayley_neumann": method.terms is not None,
        }

    def method(self, settings: Settings, keys: Sequence[str], model: nn.Module) -> Method:
        """Return OFT with the settings."""
        settings.lose("module_dropout")
        settings.ignore("eps")  # of `coft`
        size, terms = (
            settings.take("oft_block_size", 0),
            settings.take("num_cayley_neumann_terms", 5),
        )
        if not size:
            raise settings.refusal("oft_block_size", "must be the width of a block")
        return OFT(
            block_size=size,
            terms=terms if settings.take("use_cayley_neumann", False) else None,
            targets=on_weights.targets_of(settings, model),
        )

    def entries(self, part: Part) -> list[Entry]:
        """Return the upper triangles of each host."""
        return on_weights.entries_of(part, ".weight")


SPELLING = OFTSpelling()
