"""LN-tuning: peft trains a copy of each norm, under `ln_tuning_layers`."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_peft.delta import SLOT
from lightning_peft.files.peft import names
from lightning_peft.files.peft.settings import Settings
from lightning_peft.files.peft.spelling import BASE, Entry, Part, Spelling, constant, reshaped
from lightning_peft.method import Method
from lightning_peft.methods.ln_tuning import LNTuning


class LNTuningSpelling(Spelling):
    """Norms that are trained in place."""

    peft_type = "LN_TUNING"
    kinds = ("ln_tuning",)

    def config(self, part: Part) -> dict[str, Any]:
        """Return the settings of the method as peft spells them."""
        norms = names.shortest(names.module_names(part.model), _norms(part))
        return {"exclude_modules": None, "target_modules": norms}

    def method(self, settings: Settings, keys: Sequence[str], model: nn.Module) -> Method:
        """Return LN-tuning of the norms that are named."""
        return LNTuning(targets=names.as_targets(model, names.target_hosts(settings, model)))

    def entries(self, part: Part) -> list[Entry]:
        """Return all tensors of each norm, those that were not trained as they are in the base."""
        return [entry for norm in _norms(part) for entry in _entries(part, norm)]


def _norms(part: Part) -> list[str]:
    return sorted({name.rpartition(".")[0] for name in part.method.in_place(part.model)})


def _entries(part: Part, norm: str) -> list[Entry]:
    trained, found = set(part.adapter.tensors()), []
    for leaf, tensor in part.host(norm).state_dict(keep_vars=True).items():
        theirs, ours = f"{BASE}{norm}.ln_tuning_layers.{leaf}", f"{norm}.{leaf}"
        if SLOT in leaf.split("."):
            continue
        if ours in trained:
            found.append(reshaped(theirs, ours, tensor.shape, tensor.shape))
        else:
            found.append(constant(theirs, tensor.detach, "the base, in which it was not trained"))
    return found


SPELLING = LNTuningSpelling()
