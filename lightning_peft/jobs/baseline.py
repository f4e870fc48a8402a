"""`job=baseline`: what the frozen base is worth without a method."""

from dataclasses import dataclass

from lightning.pytorch import seed_everything
from omegaconf import DictConfig

from lightning_peft.jobs import trainers
from lightning_peft.jobs.fit import parts
from lightning_peft.jobs.job import Job
from lightning_peft.jobs.outcome import baselines
from lightning_peft.jobs.run_folder import created, resolved, title
from lightning_peft.report import Report, print_report, write_report


@dataclass(frozen=True, kw_only=True)
class MeasureBaseline(Job):
    """Train nothing but a head on the frozen base, and report what it was worth."""

    def run(self, config: DictConfig) -> None:
        settings = resolved(config)
        with created(settings) as run:
            seed_everything(settings["seed"], workers=True, verbose=False)
            source, data, task = parts(settings)
            run.describe(settings)
        device = trainers.for_judging(settings, []).strategy.root_device
        found = baselines(task, source, data, device)
        metric = task.metric
        report = Report(title=f"{title(settings)}: frozen base", metric=metric, results=found)
        write_report(run.path, report)
        print_report(report)
