"""IA3; a vector is a row `(1, in)` where it scales an input, a column `(out, 1)` for an output."""

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from lightning_peft.files.peft import names, on_weights
from lightning_peft.files.peft.settings import Settings
from lightning_peft.files.peft.spelling import (
    BASE,
    Entry,
    Inexpressible,
    Part,
    Spelling,
    reshaped,
)
from lightning_peft.method import Method
from lightning_peft.methods.ia3 import IA3, ScaledInput, ScaledOutput, Vector


class IA3Spelling(Spelling):
    """Vectors that scale inputs and outputs."""

    peft_type = "IA3"
    kinds = ("ia3",)

    def config(self, part: Part) -> dict[str, Any]:
        """Return the settings of the method as peft spells them."""
        inputs = [h for h, d in part.deltas.items() if isinstance(d, ScaledInput)]
        every = names.module_names(part.model)
        return {
            "exclude_modules": None,
            "fan_in_fan_out": on_weights.turned(part),
            "feedforward_modules": _ends(every, inputs),
            "init_ia3_weights": True,
            "target_modules": names.shortest(every, part.deltas),
        }

    def method(self, settings: Settings, keys: Sequence[str], model: nn.Module) -> Method:
        """Return IA3 with the settings."""
        settings.ignore("fan_in_fan_out", "init_ia3_weights")
        hosts = names.target_hosts(settings, model)
        inner = settings.any_of("feedforward_modules", list, str) or []
        inputs = [host for host in hosts if names.meant(inner, host, loose=True)]
        outputs = [host for host in hosts if host not in inputs]
        return IA3(
            keys_values=names.as_targets(model, outputs) if outputs else (),
            feed_forward=names.as_targets(model, inputs) if inputs else (),
        )

    def entries(self, part: Part) -> list[Entry]:
        """Return the vector of each host."""
        return [_entry(part, host, delta) for host, delta in part.deltas.items()]


def _entry(part: Part, host: str, delta: Any) -> Entry:
    if not isinstance(delta, ScaledInput | ScaledOutput):
        raise Inexpressible(f"peft's IA3 cannot scale the weights of `{host}`.")
    own = tuple(cast(Vector, delta).scale.shape)
    shape: tuple[int, ...] = (1, own[0]) if isinstance(delta, ScaledInput) else (own[0], 1)
    if len(own) > 1:  # of a convolution
        shape = (1, *own)
    return reshaped(f"{BASE}{host}.ia3_l", part.key(host, "scale"), shape, own)


def _ends(every: Sequence[str], chosen: Sequence[str]) -> list[str] | str:
    """Return ends by which peft finds the inputs; it compares them without regard to dots."""
    found = names.shortest(every, chosen)
    if isinstance(found, str) or set(chosen) == {n for n in every if n.endswith(tuple(found))}:
        return found
    return sorted(chosen)


SPELLING = IA3Spelling()
