"""Freeze: train the top of the model in place and nothing else (partial fine-tuning).

With a schedule the lower layers join later, as in gradual unfreezing (Howard and Ruder 2018,
https://arxiv.org/abs/1801.06146).
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from lightning_peft.delta import SLOT
from lightning_peft.errors import ConfigError, TargetError
from lightning_peft.method import Method
from lightning_peft.structure import anatomy
from lightning_peft.structure.targets import Patterns, trained_in_place
from lightning_peft.structure.tops import above_layers, running_order

_USUAL = 2


@dataclass(frozen=True, kw_only=True)
class Freeze(Method):
    """Partial fine-tuning: the top layers, what stands above them, and what patterns name.

    Raises:
        ConfigError: the number of layers is negative, or the schedule does not grow.
    """

    kind: ClassVar[str] = "freeze"

    layers: int | None = None
    """How many of the top layers are trained from the start, and what stands above them; None
    trains two, or one where the model has no more (ALBERT shares one)."""

    patterns: Patterns = ()
    """Patterns of further modules or parameters to train (`*.bias`, `embeddings`)."""

    schedule: Mapping[int, int] = field(default_factory=dict)
    """Epoch (from 0) to number of top layers trained from then on, such as {1: 4, 2: 6}."""

    def __post_init__(self) -> None:
        if self.layers is not None and self.layers < 0:
            raise ConfigError(f"`layers` must not be negative, but is {self.layers} instead.")
        start = _USUAL if self.layers is None else self.layers
        steps = [(0, start), *sorted((int(e), int(n)) for e, n in self.schedule.items())]
        if any(e <= d or n <= m for (d, m), (e, n) in itertools.pairwise(steps)):
            raise ConfigError(
                f"`schedule` must map later epochs to more than {start} layers, "
                f"but is {dict(self.schedule)} instead."
            )

    def in_place(self, model: nn.Module) -> list[str]:
        """Return everything that is trained at some time; it is all declared at the start."""
        most = max([self._start(model), *self.schedule.values()])
        names = self._top(model, most)
        if most:
            names += above_layers(model, running_order(model))
        return names + (trained_in_place(model, self.patterns) if self.patterns else [])

    def start_epochs(self, model: nn.Module) -> dict[str, int]:
        """Return the epoch from which each parameter of a scheduled layer is trained."""
        starts: dict[str, int] = {}
        for epoch, count in sorted(self.schedule.items(), reverse=True):
            starts |= dict.fromkeys(self._top(model, count), int(epoch))
        first = {*self._top(model, self._start(model))}
        return {name: epoch for name, epoch in starts.items() if name not in first}

    def _start(self, model: nn.Module) -> int:
        if self.layers is not None:
            return self.layers
        return min(_USUAL, len(anatomy.layers(model))) or _USUAL  # which refuses a model of none

    def _top(self, model: nn.Module, count: int) -> list[str]:
        stack = running_order(model)
        if count > len(stack):
            raise TargetError(
                f"`layers` must be at most {len(stack)}, the layers that were found in "
                f"{type(model).__name__}, but is {count} instead."
            )
        roots = tuple(f"{name}." for name, _ in stack[len(stack) - count :])
        named = [n for n, _ in model.named_parameters() if f".{SLOT}." not in n]
        return [n for n in named if roots and n.startswith(roots)]
