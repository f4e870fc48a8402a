"""Full fine-tuning: every parameter is trained; the baseline to judge the other methods by."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lightning_peft.delta import SLOT
from lightning_peft.method import Method


@dataclass(frozen=True, kw_only=True)
class FullFineTuning(Method):
    """Train all of the model in place."""

    kind: ClassVar[str] = "full"

    keep_original: bool = False
    """Keep a copy of the base, twice the memory, so that `disabled()` and `remove()` work."""

    @property
    def keeps_original(self) -> bool:  # type: ignore[override]
        """Whether the base from before the training is kept."""
        return self.keep_original

    def in_place(self, model: nn.Module) -> list[str]:
        """Return every floating-point parameter."""
        named = model.named_parameters()
        return [n for n, p in named if p.is_floating_point() and f".{SLOT}." not in f".{n}"]
