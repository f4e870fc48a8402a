"""`job=test run=<folder>`: score a run on held-out rows."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.table import Table

from lightning_peft.jobs import judging
from lightning_peft.jobs.conf import key_of
from lightning_peft.jobs.job import Job
from lightning_peft.jobs.run_folder import RunFolder, existing, resolved
from lightning_peft.report import open_console


@dataclass(frozen=True, kw_only=True)
class Test(Job):
    """Score a checkpoint on the test rows, or on those of `data.path=<file>`."""

    checkpoint: str = "best"
    """Which one: best, last, or a file."""

    def run(self, config: DictConfig) -> None:
        settings, run = resolved(config), existing(config, "test")
        path = settings["data"].get("path")
        if isinstance(path, str) and _was_given("data.path"):
            settings["data"]["path"] = {"test": path}
        score(settings, run, self.checkpoint, "test")


def score(settings: dict[str, Any], run: RunFolder, which: str, split: str) -> None:
    """Judge a checkpoint on a split, print it, and write `<split>.json` into the run's folder."""
    checkpoint = judging.checkpoint_of(run, which)
    module, data = judging.load(settings, checkpoint)
    found = judging.judge(settings, checkpoint, split, module, data)
    _print(found)
    kept = {k: v for k, v in asdict(found).items() if k not in ("inputs", "targets", "predictions")}
    file = run.path / f"{split}.json"
    file.write_text(json.dumps(kept, indent=2, default=str) + "\n", encoding="utf-8")
    open_console().print(f"written to {file}", soft_wrap=True, highlight=False)


def _was_given(setting: str) -> bool:
    return setting in map(key_of, HydraConfig.get().overrides.task)


def _print(found: judging.Judgement) -> None:
    rows = f"{found.rows:,} rows, " if found.rows is not None else ""
    title = f"{found.split}: {rows}{found.checkpoint.name}"
    console = open_console()
    if found.per_class:
        names = list(next(iter(found.per_class.values())))
        table = Table(title=title)
        for column in ("label", *names):
            table.add_column(column, justify="left" if column == "label" else "right")
        for label, scores in found.per_class.items():
            table.add_row(label, *(_number(scores[name]) for name in names))
        console.print(table)
    else:
        console.print(title, highlight=False)
    for name, value in found.metrics.items():
        console.print(f"{found.split} {name}: {value:.4f}", highlight=False)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"  # a count, or a score
