"""LN-tuning: peft trains a copy of each norm, under `ln_tuning_layers`."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_peft.files.peft import in_place, names
from lightning_peft.files.peft.settings import Settings
from lightning_peft.files.peft.spelling import BASE, Entry, Part, Spelling
from lightning_peft.method import Method
from lightning_peft.methods.ln_tuning import LNTuning


class LNTuningSpelling(Spelling):
    """Norms that are trained in place."""

    peft_type = "LN_TUNING"
    kinds = ("ln_tuning",)

    def config(self, part: Part) -> dict[str, Any]:
        """Return the settings of the method as peft spells them."""
        norms = in_place.owners_of(part.model, part.method.in_place(part.model))
        ends = names.shortest(names.module_names(part.model), norms)
        return {"exclude_modules": None, "target_modules": ends}

    def method(self, settings: Settings, keys: Sequence[str], model: nn.Module) -> Method:
        """Return LN-tuning of the norms that are named."""
        return LNTuning(targets=names.as_targets(model, names.target_hosts(settings, model)))

    def entries(self, part: Part) -> list[Entry]:
        """Return all tensors of each norm, those that were not trained as they are in the base."""
        trained, inner = part.method.in_place(part.model), "ln_tuning_layers."
        norms = in_place.owners_of(part.model, trained)
        return in_place.entries_of(part.model, norms, trained, BASE, inner)


SPELLING = LNTuningSpelling()
