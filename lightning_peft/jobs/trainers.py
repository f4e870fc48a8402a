"""The Trainer of a run, built from its settings."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.plugins.environments import LightningEnvironment

from lightning_peft.callbacks import WandbAdapter
from lightning_peft.config import TARGET, instantiate
from lightning_peft.errors import ConfigError, require
from lightning_peft.jobs.run_folder import RunFolder
from lightning_peft.strategies.checks import assert_same_on_all_ranks, check_strategy

if TYPE_CHECKING:
    from lightning_peft.tasks.task import Task

_STRATEGIES = {"FSDPStrategy": "fsdp", "DeepSpeedStrategy": "deepspeed"}


class SameSettings(Callback):
    """Stop before the first step when the processes of a run were given different settings."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.text = json.dumps(settings, sort_keys=True, default=str)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert_same_on_all_ranks(self.text, "the configuration")


def for_training(settings: Mapping[str, Any], run: RunFolder, task: "Task") -> Trainer:
    """Return the Trainer that fits, with its loggers and callbacks.

    Raises:
        ConfigError: The strategy cannot run here, or several processes would sweep.
    """
    spec = settings["trainer"]
    _check(spec)
    trainer: Trainer = instantiate(
        {
            **spec,
            "callbacks": [
                SameSettings(settings),
                Timer(),
                WandbAdapter(settings, artifact=False),
                *_callbacks(settings["callbacks"], run, task),
            ],
            "logger": _loggers(settings["logger"], run),
            "default_root_dir": str(run.path),
            "enable_model_summary": False,
        },
        "trainer",
    )
    if trainer.world_size > 1 and _is_sweep():
        raise ConfigError(
            f"`trainer.devices` must be 1 in a sweep (--multirun), but {trainer.world_size} "
            f"processes are asked for: each would sweep by itself. Start the runs one by one."
        )
    return trainer


def for_judging(settings: Mapping[str, Any], callbacks: list[Callback]) -> Trainer:
    """Return a Trainer of one process, which sees every row once, and that logs nowhere.

    With several processes a sampler repeats rows until all have as many.
    """
    spec = {**settings["trainer"], "devices": 1, "num_nodes": 1, "strategy": "auto"}
    _check(spec)
    own = {
        "callbacks": callbacks,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "plugins": [LightningEnvironment()],  # not that of torchrun, which counts all processes
    }
    trainer: Trainer = instantiate({**spec, **own}, "trainer")
    return trainer


def _check(spec: Mapping[str, Any]) -> None:
    strategy = spec.get("strategy")
    kind = str(strategy.get(TARGET)) if isinstance(strategy, Mapping) else str(strategy)
    name = _STRATEGIES.get(kind.rpartition(".")[2].removeprefix("PEFT"), kind)
    clips = spec.get("gradient_clip_val") is not None
    clip = (spec.get("gradient_clip_algorithm") or "norm") if clips else None
    check_strategy(name, str(spec.get("accelerator", "auto")), clip)
    if name.startswith("deepspeed"):
        require("deepspeed", "deepspeed")
    if spec.get("accelerator") in ("gpu", "cuda"):
        import torch

        if not torch.cuda.is_available():
            raise ConfigError(
                f"`trainer.accelerator` is {spec['accelerator']!r}, but there is no CUDA GPU here: "
                f"use `trainer=cpu`."
            )


def _is_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN


def _loggers(specs: Mapping[str, Any], run: RunFolder) -> list[Any]:
    chosen = {name: spec for name, spec in specs.items() if spec is not None}
    return [_build(spec, f"logger.{name}", folder=run.path) for name, spec in chosen.items()]


def _callbacks(specs: Mapping[str, Any], run: RunFolder, task: "Task") -> list[Any]:
    found = []
    for name, spec in specs.items():
        if spec is not None:
            judge = _judge(spec, f"callbacks.{name}", task)
            found.append(_build(spec, f"callbacks.{name}", dirpath=run.checkpoints, **judge))
    return found


def _judge(spec: Mapping[str, Any], where: str, task: "Task") -> dict[str, str]:
    """Return the task's metric for what wants one (`monitor: null`), and whether more is better."""
    if "monitor" not in spec or spec["monitor"] is None:
        return {"monitor": task.monitor, "mode": task.mode}
    if spec.get("mode") is None:
        raise ConfigError(
            f"`{where}.mode` must say whether less or more of {spec['monitor']!r} is better: "
            f"give `{where}.mode=min` or `{where}.mode=max`."
        )
    return {}


def _build(spec: Mapping[str, Any], where: str, **defaults: str | Path) -> Any:
    """Build `spec`, with the run's own values for those settings that are null."""
    filled = {k: str(v) for k, v in defaults.items() if k in spec and spec[k] is None}
    return instantiate({**spec, **filled}, where)
