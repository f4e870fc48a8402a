"""`job=fit`: train an adapter, judge it, and keep it with everything that made it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig

from lightning_peft.config import TARGET, check_settings, instantiate
from lightning_peft.data.rows import RowData
from lightning_peft.errors import ConfigError
from lightning_peft.jobs import trainers
from lightning_peft.jobs.conf import key_of
from lightning_peft.jobs.job import Job
from lightning_peft.jobs.outcome import finish
from lightning_peft.jobs.run_folder import RunFolder, created, resolved
from lightning_peft.models import ModelSource
from lightning_peft.module import PEFTModule
from lightning_peft.report import open_console
from lightning_peft.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class Fit(Job):
    """Train an adapter in a new run folder, and report what it was worth."""

    baseline: bool = True
    """Compare with the frozen base and a new head."""

    def run(self, config: DictConfig) -> None:
        settings = resolved(config)
        settings["method"] = _chosen(settings["method"])
        with created(settings) as run:
            trainer = train(settings, run)
        finish(settings, run, trainer, self.baseline)


def train(settings: Mapping[str, Any], run: RunFolder, checkpoint: Path | None = None) -> Trainer:
    """Fit the module that `settings` describe, from a checkpoint on if one is given.

    Raises:
        KeyboardInterrupt: The user stopped it; checkpoint and adapter were written.
    """
    seed_everything(settings["seed"], workers=True, verbose=False)
    module, data = build(settings)
    module.peft_export = False  # `finish` writes the best adapter, not the last
    trainer = trainers.for_training(settings, run, module.task)
    run.describe(settings)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    except SystemExit as stop:  # what Lightning makes of Ctrl-C
        if isinstance(stop, SIGTERMException) or not trainer.interrupted:
            raise
        _keep(module, trainer, run)
        raise KeyboardInterrupt from stop
    return trainer


def build(settings: Mapping[str, Any]) -> tuple[PEFTModule, RowData]:
    """Return the module and the data, with each other's labels and tokenizer."""
    optimizer = check_settings(PEFTModule, settings["optimizer"], "optimizer")
    adapter = check_settings(PEFTModule, settings["adapter"], "adapter")
    source, data, task = parts(settings)
    methods = list(instantiate(_reading(settings["method"], source), "method").values())
    module = PEFTModule(source, methods, task, **optimizer, **adapter)
    task.check(module.model, data)
    return module, data


def parts(settings: Mapping[str, Any]) -> tuple[ModelSource, RowData, Task]:
    """Return the recipe of the base, the data, and the task that knows it."""
    source: ModelSource = instantiate(settings["model"], "model")
    data: RowData = instantiate(settings["data"], "data")
    task: Task = instantiate(settings["task"], "task")
    task.equip(data, source)
    data.prepare_data()
    return source, data, task.connect(data)


def _chosen(methods: Mapping[str, Any]) -> dict[str, Any]:
    """Return methods without what a recipe says of one that `method=` has put others in place of.

    Raises:
        ConfigError: The command line says it.
    """
    asked = [key_of(text) for text in HydraConfig.get().overrides.task]
    kept = {name: settings for name, settings in methods.items() if TARGET in settings}
    left_out = [name for name in methods if name not in kept]
    for name in left_out:
        if any(f"{key}.".startswith(f"method.{name}.") for key in asked):
            raise ConfigError(
                f"`method.{name}` must be the settings of a method that is chosen, but the chosen "
                f"are {', '.join(kept)}: choose it with `method={name}`."
            )
    return kept


def _reading(methods: Mapping[str, Any], source: ModelSource) -> dict[str, Any]:
    """Let methods that start from a text read it as the model does, unless they say how."""
    return {
        name: {**spec, "tokenizer": source.path()} if _reads(spec) else spec
        for name, spec in methods.items()
    }


def _reads(spec: Mapping[str, Any]) -> bool:
    return spec.get("tokenizer") == "" and any(spec[k] for k in spec if k.endswith("_text"))


def _keep(module: PEFTModule, trainer: Trainer, run: RunFolder) -> None:
    if trainer.is_global_zero:
        module.trained.save(run.adapter)
        open_console().print(
            f"Interrupted. The adapter as it was is in {run.adapter}; "
            f"go on with: lightning-peft job=resume run={run.path}",
            soft_wrap=True,
            highlight=False,
        )
