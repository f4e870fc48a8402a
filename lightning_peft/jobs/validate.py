"""`job=validate run=<folder>`: score a run on its validation rows."""

from dataclasses import dataclass

from omegaconf import DictConfig

from lightning_peft.jobs.job import Job
from lightning_peft.jobs.run_folder import existing, resolved
from lightning_peft.jobs.test import score


@dataclass(frozen=True, kw_only=True)
class Validate(Job):
    """Score a checkpoint on the validation rows, on which the best one was chosen."""

    checkpoint: str = "best"
    """Which one: best, last, or a file."""

    def run(self, config: DictConfig) -> None:
        score(resolved(config), existing(config, "validate"), self.checkpoint, "validation")
