"""C3A."""

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from lightning_peft.files.peft import names, on_weights
from lightning_peft.files.peft.settings import Settings
from lightning_peft.files.peft.spelling import Entry, Part, Spelling
from lightning_peft.method import Method
from lightning_peft.methods.c3a import C3A


class C3ASpelling(Spelling):
    """Circulant blocks."""

    peft_type = "C3A"
    kinds = ("c3a",)

    def config(self, part: Part) -> dict[str, Any]:
        """Return the settings of the method as peft spells them."""
        on_weights.require_hosts(part, on_weights.LINEAR)
        sizes = {host: t.shape[-1] for host, _, _, t in on_weights.own_tensors(part)}
        size = cast(C3A, part.method).block_size
        return on_weights.hosts_config(part) | {
            "bias": "none",
            "block_size": size,
            "block_size_pattern": names.deviating(sizes, size),
        }

    def method(self, settings: Settings, keys: Sequence[str], model: nn.Module) -> Method:
        """Return C3A with the settings."""
        settings.ignore("block_size_pattern")  # the shapes show whether it is as ours
        return C3A(
            block_size=settings.take("block_size", 256),
            targets=on_weights.targets_of(settings, model),
        )

    def entries(self, part: Part) -> list[Entry]:
        """Return the blocks of each host."""
        return on_weights.entries_of(part)


SPELLING = C3ASpelling()
