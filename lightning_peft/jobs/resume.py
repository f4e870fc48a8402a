"""`job=resume run=<folder>`: continue an interrupted run."""

from dataclasses import dataclass

from omegaconf import DictConfig

from lightning_peft.config import to_spec
from lightning_peft.files.last_checkpoint import last_checkpoint
from lightning_peft.jobs.fit import Fit, train
from lightning_peft.jobs.job import Job
from lightning_peft.jobs.outcome import finish
from lightning_peft.jobs.run_folder import existing, resolved


@dataclass(frozen=True, kw_only=True)
class Resume(Job):
    """Continue from the newest intact checkpoint, in the same folder and the same W&B run."""

    baseline: bool = True
    """Compare with the frozen base and a new head at the end."""

    def run(self, config: DictConfig) -> None:
        settings, run = resolved(config), existing(config, "resume")
        settings["job"] = to_spec(Fit(baseline=self.baseline))
        trainer = train(settings, run, last_checkpoint(run.path))
        finish(settings, run, trainer, self.baseline)
