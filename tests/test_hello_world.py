"""How much of our code a first use runs through, and a newcomer reads: budgets that hold."""

import inspect
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import lightning_peft
from lightning_peft import PEFT, Adapter, LoRA, delta, inject
from lightning_peft.deltas.hosts import deltas_for
from lightning_peft.deltas.low_rank import LowRank, Product
from lightning_peft.ops.low_rank import add_low_rank
from lightning_peft.training.hooks import LateHooks, PEFTHooks, adopt_late
from lightning_peft.training.injection import Injection

PACKAGE = str(Path(lightning_peft.__file__).parent)
BUDGET = 185
"""Distinct lines of the package, ruff-formatted, from `inject` to the first output."""


READING = (
    PEFT, adopt_late, LateHooks.configure_model, PEFTHooks.peft_inject, Injection.into, inject,
    Adapter.__init__, LoRA, deltas_for, Product, LowRank, add_low_rank,
    delta.attach, delta._open, delta._after,
)  # fmt: skip
"""The way from the callback to LoRA's arithmetic, in order; docs/architecture.md names it too."""

READING_BUDGET = 400
"""Lines of it, docstrings included."""


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def test_a_first_use_runs_through_few_lines() -> None:
    lines: set[tuple[str, int]] = set()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            lines.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    model, before = TwoLayers(), sys.gettrace()
    sys.settrace(trace)
    try:
        adapter = inject(model, LoRA())
        model(torch.ones(1, 8))
    finally:
        sys.settrace(before)
    assert adapter.num_parameters == 8 * (8 + 16) + 8 * (16 + 4)
    assert len(lines) <= BUDGET


def test_the_way_from_the_callback_to_the_arithmetic_is_short() -> None:
    lines = {part.__qualname__: len(inspect.getsource(part).splitlines()) for part in READING}
    assert sum(lines.values()) <= READING_BUDGET, lines
