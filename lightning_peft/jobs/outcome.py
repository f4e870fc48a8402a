"""What a finished run leaves: the best adapter, its report, and the curves."""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import distributed

from lightning_peft.callbacks import log_adapter
from lightning_peft.config import instantiate
from lightning_peft.data.rows import RowData
from lightning_peft.errors import ConfigError, DataError, MissingExtraError
from lightning_peft.jobs import judging
from lightning_peft.jobs.judging import Judgement
from lightning_peft.jobs.run_folder import RunFolder, title
from lightning_peft.memory import peak_memory
from lightning_peft.models import ModelSource
from lightning_peft.module import PEFTModule
from lightning_peft.report import (
    Report,
    Result,
    choose_examples,
    folder_bytes,
    plot_curves,
    print_report,
    write_report,
)
from lightning_peft.tasks.task import Task


def finish(settings: Mapping[str, Any], run: RunFolder, trainer: Trainer, baseline: bool) -> None:
    """Export the best adapter and report what it was worth; the first process alone does this."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()  # else metrics would wait for the other processes
    if not trainer.is_global_zero:
        return
    device = trainer.strategy.root_device
    memory = peak_memory(device)  # before the judging, which would add to it
    best = run.checkpoints / "best.ckpt"
    checkpoint = judging.checkpoint_of(run, "best" if best.exists() else "last")
    module, data = judging.load(settings, checkpoint)
    log_adapter(trainer, module.trained.save(run.adapter))
    splits = [split for split in ("validation", "test") if judging.has_split(data, split)]
    found = {s: judging.judge(settings, checkpoint, s, module, data) for s in splits}
    source = instantiate(settings["model"], "model")
    results = baselines(module.task, source, data, device) if baseline else []
    own = _result(settings, run, trainer, module, found)
    results.append(dataclasses.replace(own, memory=memory))
    report = _report(settings, run, module, results, found)
    write_report(run.path, report)
    print_report(report)
    _finish_loggers(trainer)


def baselines(
    task: Task, source: ModelSource, data: LightningDataModule, device: torch.device
) -> list[Result]:
    """Return what the frozen base is worth; nothing where it has no form to measure."""
    if isinstance(data, RowData) and data.loading.streaming:
        rank_zero_warn("There is no baseline to compare with, since training rows are streamed.")
        return []
    model = task.load_model(source)
    total = sum(parameter.numel() for parameter in model.parameters())
    data.setup("fit")
    test = data.test_dataloader() if judging.has_split(data, "test") else None
    loaders = data.train_dataloader(), data.val_dataloader(), test
    try:
        found = task.baselines(model.to(device), *loaders)
    except ConfigError as error:
        rank_zero_warn(f"There is no baseline to compare with: {error}")
        return []
    return [
        Result(
            name=one.name,
            validation=one.validation,
            test=one.test,
            trained=one.trained,
            total=total,
            adapter_bytes=4 * one.trained,
            seconds=one.seconds,
        )
        for one in found
    ]


def _result(
    settings: Mapping[str, Any],
    run: RunFolder,
    trainer: Trainer,
    module: PEFTModule,
    found: Mapping[str, Judgement],
) -> Result:
    timer = next(c for c in trainer.callbacks if isinstance(c, Timer))  # type: ignore[attr-defined]
    return Result(
        name=" + ".join(settings["method"]),
        validation=found["validation"].metrics if "validation" in found else {},
        test=found["test"].metrics if "test" in found else {},
        trained=module.trained.num_parameters,
        total=sum(parameter.numel() for parameter in module.parameters()),
        adapter_bytes=folder_bytes(run.adapter),
        seconds=timer.time_elapsed("train"),
    )


def _report(
    settings: Mapping[str, Any],
    run: RunFolder,
    module: PEFTModule,
    results: list[Result],
    found: Mapping[str, Judgement],
) -> Report:
    shown = found.get("test", found["validation"])
    examples = map(module.task.example, shown.inputs, shown.targets, shown.predictions)
    return Report(
        title=title(settings),
        metric=module.task.metric,
        results=results,
        examples=choose_examples([one for one in examples if one is not None]),
        per_class=shown.per_class,
        paths=_paths(run, shown.checkpoint),
    )


def _paths(run: RunFolder, checkpoint: Path) -> dict[str, Path]:
    paths = {"run": run.path, "adapter": run.adapter, "checkpoint": checkpoint}
    with contextlib.suppress(DataError, MissingExtraError):  # no metrics, or no matplotlib
        paths["curves"] = plot_curves(run.metrics, run.curves)
    return paths


def _finish_loggers(trainer: Trainer) -> None:
    """End the run on W&B, else the next job of a sweep would write into it."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()
