"""IA3; a vector is a row `(1, in)` where it scales an input, a column `(out, 1)` for an output."""

import re
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
        targets, inner = _ends(names.module_names(part.model), list(part.deltas), inputs)
        return {
            "exclude_modules": None,
            "fan_in_fan_out": on_weights.turned(part),
            "feedforward_modules": inner,
            "init_ia3_weights": True,
            "target_modules": targets,
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


def _ends(every: Sequence[str], hosts: Sequence[str], inputs: Sequence[str]) -> tuple[Any, Any]:
    """Return what names the hosts, and what of it names those with a scaled input.

    peft asks for a subset, and looks for the ends of names in it without regard to dots.
    """
    outputs = [host for host in hosts if host not in inputs]
    inner, outer = names.shortest(every, inputs), names.shortest(every, outputs)
    if isinstance(inner, str) or isinstance(outer, str):
        return "|".join(map(re.escape, hosts)), "|".join(map(re.escape, inputs))
    if any(host.endswith(tuple(inner)) for host in outputs):
        inner = sorted(inputs)
    return sorted({*inner, *outer}), inner


SPELLING = IA3Spelling()
