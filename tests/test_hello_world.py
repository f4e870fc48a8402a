"""How much of our code a first use runs through: a budget, so that it does not grow unnoticed."""

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import lightning_peft
from lightning_peft import LoRA, inject

PACKAGE = str(Path(lightning_peft.__file__).parent)
BUDGET = 170
"""Distinct lines of the package, ruff-formatted, from `inject` to the first output."""


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
