"""The course of the learning rate: a linear warm-up, then a decay."""

import math
from typing import Literal

Course = Literal["linear", "cosine", "constant"]


def warmup_decay(step: int, *, steps: int, warmup: int, course: Course = "linear") -> float:
    """Return the factor of the learning rate at an optimizer step, counted from 0.

    As a `functools.partial` it leaves nothing in the state of a `LambdaLR`, so that a run that is
    resumed for more epochs follows its new course.

    Args:
        step: the step.
        steps: optimizer steps in all.
        warmup: steps over which the factor rises from 0 to 1.
        course: how it falls to 0 afterwards; `constant` does not fall.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if course == "constant":
        return 1.0
    left = max(0.0, (steps - step) / max(1, steps - warmup))
    return left if course == "linear" else 0.5 * (1 - math.cos(math.pi * left))
