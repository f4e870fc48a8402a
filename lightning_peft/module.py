"""`PEFTModule`: a LightningModule around a bare model and a task."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MetricCollection

from lightning_peft.adapter import Adapter
from lightning_peft.carrying.group import AdapterGroup, single
from lightning_peft.config import instantiate_as, to_spec
from lightning_peft.errors import CheckpointError, ConfigError, near_misses
from lightning_peft.files.checkpoint_io import AtomicCheckpointIO
from lightning_peft.method import Method
from lightning_peft.models import ModelSource
from lightning_peft.structure.targets import Patterns
from lightning_peft.tasks.task import Task
from lightning_peft.training import checkpoint as content
from lightning_peft.training.hooks import PEFTHooks, adopt
from lightning_peft.training.injection import Injection, as_methods
from lightning_peft.training.schedule import warmup_decay

_COURSES = ("linear", "cosine", "constant")


class PEFTModule(pl.LightningModule):
    """Train an adapter on a task, with AdamW, a warm-up and a decay of the learning rate.

    The base keeps the mode that it comes with. `from_pretrained` returns eval mode, in which the
    base's own dropout is off and only that of the method acts; `model.train()` turns it on.

    Args:
        model: the base, or the recipe by which the task loads it.
        methods: the method, or several in order.
        task: what a batch means: loss, predictions and metrics.
        lr: peak learning rate of what the methods train.
        weight_decay: AdamW's weight decay of matrices; biases and norms have none.
        warmup: share of all steps over which the learning rate rises.
        schedule: how it falls afterwards: linear, cosine or constant.
        head_lr: peak learning rate of the head and of what `train` names; None takes `lr`.
        name: the adapter's name.
        train: patterns of further modules or parameters to train in place.
        head: whether the fresh task head is trained in place.
        beside: folders of trained adapters to load first, by name (`AdapterFusion`).

    Example::

        module = PEFTModule(model, LoRA(r=16), SequenceClassification())
        Trainer(max_epochs=3).fit(module, data)
        module.adapter.save("adapter")

    Raises:
        ConfigError: a setting is out of its range.
        TargetError: a pattern matches nothing.
        AdapterError: the model is wrapped, or carries another adapter.
    """

    peft_export: bool
    """Whether the end of a fit writes `adapter/` beside the folder of the checkpoints."""

    def __init__(
        self,
        model: nn.Module | ModelSource,
        methods: Method | Sequence[Method],
        task: Task,
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.06,
        schedule: str = "linear",
        head_lr: float | None = None,
        name: str = "default",
        train: Patterns = (),
        head: bool = True,
        beside: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        settings = {
            "lr": lr,
            "weight_decay": weight_decay,
            "warmup": warmup,
            "schedule": schedule,
            "head_lr": head_lr,
        }
        _check(settings)
        injection = Injection(
            as_methods(methods), name, train, head, beside or {}, task.adapters, "model"
        )
        self.model = task.load_model(model) if isinstance(model, ModelSource) else model
        self.task, self.lr, self.head_lr = task, lr, head_lr
        described = {"model": _describe(model), "task": to_spec(task)}
        asked = {k: v for k, v in injection.to_spec().items() if k != "adapters"}
        self.save_hyperparameters({**described, **asked, **settings})
        self.validation_metrics = task.metrics().clone(prefix="val/")
        self.test_metrics = task.metrics().clone(prefix="test/")
        adopt(self, injection)

    @property
    def adapter(self) -> Adapter:
        """The adapter, there from the start.

        Raises:
            AdapterError: the task trains several side by side.
        """
        return single(cast(PEFTHooks, self).peft_adapter, "module.adapter")

    @property
    def trained(self) -> Adapter | AdapterGroup:
        """The adapter, or those that the task trains side by side."""
        return cast(PEFTHooks, self).peft_adapter

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        path: str | Path,
        model: nn.Module | ModelSource | None = None,
        map_location: Any = "cpu",
    ) -> "PEFTModule":
        """Rebuild the base and the adapter from a checkpoint.

        Args:
            path: the checkpoint.
            model: the base, or its recipe, where the checkpoint does not know how to load it.
            map_location: where its tensors go.

        Raises:
            CheckpointError: the file is damaged, or the base is another one or cannot be rebuilt.
        """
        loaded = AtomicCheckpointIO().load_checkpoint(path, map_location)
        content.record_of(loaded, path)
        settings = dict(loaded.get(cls.CHECKPOINT_HYPER_PARAMS_KEY, {}))
        if "task" not in settings:
            raise CheckpointError(
                f"`{path}` was trained in another LightningModule: load it with "
                "`PEFT.load_from_checkpoint(YourModule, path)`."
            )
        if model is None and settings["model"] is not None:
            model = instantiate_as(ModelSource, settings["model"], "model")
        settings["model"] = model
        if model is None:
            raise CheckpointError(
                f"`{path}` was trained on a model that was built by hand: pass that model as "
                "`load_from_checkpoint(path, model=...)`."
            )
        settings["methods"] = [
            instantiate_as(Method, spec, "methods") for spec in settings["methods"]
        ]
        settings["task"] = instantiate_as(Task, settings["task"], "task")  # type: ignore[type-abstract]
        module: Any = cls(**settings)
        module.on_load_checkpoint(loaded)
        module.load_state_dict(loaded["state_dict"])
        return module

    def configure_model(self) -> None:
        """Do nothing: the model is built. A strategy that shards it asks for this hook."""

    def forward(self, batch: Any) -> Any:
        """Return what the model computes for a batch of the task."""
        return self.model(**{k: v for k, v in batch.items() if not k.startswith("row_")})

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the task's loss, a scalar."""
        loss = self.task.step(self.model, batch).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add a batch to the metrics of the validation split."""
        self._evaluate(batch, "val", self.validation_metrics)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Add a batch to the metrics of the test split."""
        self._evaluate(batch, "test", self.test_metrics)

    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
        """Return a readable prediction for each row."""
        return self.task.predictions(self.model, batch)

    def configure_optimizers(self) -> Any:
        """Return AdamW over what is trained, and its schedule by optimizer step."""
        groups = self.trained.parameter_groups(self.lr, self.hparams["weight_decay"], self.head_lr)
        optimizer = torch.optim.AdamW(groups, lr=self.lr)
        steps, course = self.trainer.estimated_stepping_batches, self.hparams["schedule"]
        if steps == float("inf"):
            raise ConfigError(
                "`max_steps` or `max_epochs` of the Trainer must be given, or the learning rate's "
                "course has no end."
            )
        factor = partial(
            warmup_decay,
            steps=int(steps),
            warmup=round(self.hparams["warmup"] * steps),
            course=course,
        )
        schedule = LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def _evaluate(self, batch: Any, split: str, metrics: MetricCollection) -> None:
        out = self.task.evaluate(self.model, batch)
        size = len(out.targets) if out.targets is not None else None
        weight = size if out.weight is None else out.weight
        self.log(f"{split}/loss", out.loss, prog_bar=True, batch_size=weight, sync_dist=True)
        metrics.update(out.predictions, out.targets)
        self.log_dict(metrics, prog_bar=True, batch_size=size)


def _describe(model: nn.Module | ModelSource) -> dict[str, Any] | None:
    """Describe how the base is loaded again; None for one that was built by hand."""
    if isinstance(model, ModelSource):
        return to_spec(model)
    name = getattr(getattr(model, "config", None), "name_or_path", "")
    return to_spec(ModelSource(name=name)) if name else None


def _check(settings: dict[str, Any]) -> None:
    for name in ("lr", "weight_decay", "warmup", "head_lr"):
        value = settings[name]
        if value is not None and not 0 <= value < float("inf"):
            raise ConfigError(f"`{name}` must be 0 or more, but is {value} instead.")
    if settings["warmup"] > 1:
        raise ConfigError(f"`warmup` must be a share up to 1, but is {settings['warmup']} instead.")
    if settings["schedule"] not in _COURSES:
        raise ConfigError(
            f"`schedule` must be one of {', '.join(_COURSES)}, but is {settings['schedule']!r} "
            f"instead.{near_misses(settings['schedule'], _COURSES)}"
        )
