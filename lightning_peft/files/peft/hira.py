"""HiRA."""

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from lightning_peft.files.peft import on_weights
from lightning_peft.files.peft.settings import Settings
from lightning_peft.files.peft.spelling import BASE, Entry, Part, Spelling, reshaped
from lightning_peft.method import Method
from lightning_peft.methods.hira import HiRA

_HOSTS = (*on_weights.LINEAR_AND_CONV1D, *on_weights.CONVOLUTIONS, nn.Embedding)


class HiRASpelling(Spelling):
    """Elementwise products of the weight and a low-rank matrix."""

    peft_type = "HIRA"
    kinds = ("hira",)

    def config(self, part: Part) -> dict[str, Any]:
        """Return the settings of the method as peft spells them."""
        on_weights.require_hosts(part, _HOSTS)
        method = cast(HiRA, part.method)
        return on_weights.hosts_config(part) | {
            "fan_in_fan_out": on_weights.turned(part),
            "hira_dropout": method.dropout,
            "r": method.r,
            "rank_pattern": {},
        }

    def method(self, settings: Settings, keys: Sequence[str], model: nn.Module) -> Method:
        """Return HiRA with the settings."""
        return HiRA(
            r=settings.take("r", 32),
            dropout=settings.take("hira_dropout", 0.0),
            targets=on_weights.targets_of(settings, model),
        )

    def entries(self, part: Part) -> list[Entry]:
        """Return both factors of each host; those of a convolution are kernels in peft."""
        found = []
        for host, name, ours, tensor in on_weights.own_tensors(part):
            module, shape, theirs = part.host(host), tuple(tensor.shape), name
            if isinstance(module, nn.Embedding):
                theirs = name.replace("hira_", "hira_embedding_")
            elif isinstance(module, on_weights.CONVOLUTIONS):
                _, *rest = module.weight.shape
                shape = (len(tensor), *rest) if name == "hira_A" else (*shape, *[1] * len(rest[1:]))
            found.append(reshaped(f"{BASE}{host}.{theirs}", ours, shape, tensor.shape))
        return found


SPELLING = HiRASpelling()
