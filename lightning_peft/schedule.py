"""The course of the learning rate: a linear warm-up, then a decay."""

import math
from dataclasses import dataclass
from typing import Literal

Course = Literal["linear", "cosine", "constant"]


@dataclass
class WarmupDecay:
    """Factor of the learning rate by optimizer step, for `torch.optim.lr_scheduler.LambdaLR`.

    A plain object and no lambda: the scheduler's state can then be stored and read safely.
    """

    steps: int
    """Optimizer steps in all."""

    warmup: int
    """Steps over which the factor rises from 0 to 1."""

    course: Course = "linear"
    """How it falls to 0 afterwards; `constant` does not fall."""

    def __call__(self, step: int) -> float:
        """Return the factor at `step`, counted from 0."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.course == "constant":
            return 1.0
        left = max(0.0, (self.steps - step) / max(1, self.steps - self.warmup))
        return left if self.course == "linear" else 0.5 * (1 - math.cos(math.pi * left))
