"""Several tasks on one base: an adapter and a head of its own for each, in one run."""

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_peft.carrying.group import Views
from lightning_peft.carrying.switching import mixed
from lightning_peft.config import TARGET, Unbuilt, instantiate_as, target_of, to_spec
from lightning_peft.data.several import SeveralData
from lightning_peft.errors import ConfigError
from lightning_peft.report import Example
from lightning_peft.tasks.task import StepOutput, Task

if TYPE_CHECKING:
    from lightning_peft.models import ModelSource


class SeveralTasks(Task):
    """Each task has a model with its own kind of head and an adapter; the base is there once.

    A step takes a batch of each task; the loss is the mean of theirs. Metrics are those of each
    task, as `<metric>_<task>`; the mean loss chooses the checkpoint.

    Args:
        tasks: the tasks, or their descriptions, by the names of their adapters.

    Raises:
        ConfigError: there are none, or a name is none for a folder and a module.
    """

    predicts = False

    def __init__(self, tasks: Unbuilt | Mapping[str, Task]) -> None:
        if not tasks:
            raise ConfigError("`task.tasks` must hold tasks by name, but is empty.")
        for name in tasks:
            _check_name(str(name))
        self.tasks = {
            name: task if isinstance(task, Task) else _built(task, name)
            for name, task in tasks.items()
        }
        self.adapters = tuple(self.tasks)

    def equip(self, data: SeveralData, source: "ModelSource") -> None:
        for name, task in self.tasks.items():
            task.equip(self._of(data, name), source)

    def connect(self, data: SeveralData) -> Self:
        """Take from the data what the tasks leave open."""
        self.tasks = {name: t.connect(self._of(data, name)) for name, t in self.tasks.items()}
        return self

    def load_model(self, source: "ModelSource") -> nn.Module:
        """Load a model for each task; what they have in common is the same tensors."""
        if source.gradient_checkpointing:
            raise ConfigError("`model.gradient_checkpointing` must be false for several tasks.")
        return Views({name: task.load_model(source) for name, task in self.tasks.items()})

    def metrics(self) -> MetricCollection:
        found: dict[str, Metric | MetricCollection] = {
            f"{kind}_{name}": OfTask(metric, name)
            for name, task in self.tasks.items()
            for kind, metric in task.metrics().items()
        }
        return MetricCollection(found, compute_groups=False)

    def step(self, model: nn.Module, batch: Mapping[str, Any]) -> StepOutput:
        """Return the mean loss, with the predictions and targets of each task."""
        return _together(
            {n: self.tasks[n].step(view, part) for n, view, part in _parts(model, batch)}
        )

    def evaluate(self, model: nn.Module, batch: Mapping[str, Any]) -> StepOutput:
        return _together(
            {n: self.tasks[n].evaluate(view, part) for n, view, part in _parts(model, batch)}
        )

    def predictions(self, model: nn.Module, batch: Any) -> list[dict[str, Any]]:
        raise ConfigError(
            "`job=predict` takes the rows of one task: load `adapter/<task>` of the run for it."
        )

    def example(self, read: Any, target: Any, prediction: Mapping[str, Any]) -> Example | None:
        return None

    def by_group(self, metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
        kinds = {name: list(map(str, task.metrics())) for name, task in self.tasks.items()}
        columns = sorted({kind for of_task in kinds.values() for kind in of_task})
        return {
            name: {kind: metrics.get(f"{kind}_{name}", float("nan")) for kind in columns}
            for name in self.tasks
        }

    def check(self, model: nn.Module, data: SeveralData) -> None:
        for name, task in self.tasks.items():
            task.check(model.get_submodule(name), self._of(data, name))

    def to_spec(self) -> dict[str, Any]:
        tasks = {name: to_spec(task) for name, task in self.tasks.items()}
        return {TARGET: target_of(type(self)), "tasks": tasks}

    def _of(self, data: Any, name: str) -> Any:
        if not isinstance(data, SeveralData) or data.of.keys() != self.tasks.keys():
            raise ConfigError(
                f"`data` must be of the tasks {', '.join(self.tasks)} by name, but is "
                f"{', '.join(data.of) if isinstance(data, SeveralData) else type(data).__name__} "
                f"instead: take `data=several`."
            )
        return data.of[name]


class OfTask(Metric):
    """A metric of one of several tasks.

    Args:
        metric: of the task.
        task: its name.
    """

    full_state_update = False

    def __init__(self, metric: Metric, task: str) -> None:
        super().__init__()
        self.metric, self.task = metric, task

    def update(self, found: list[tuple[str, StepOutput]], targets: None) -> None:
        """Add what a step found for each task."""
        for name, out in found:
            if name == self.task:
                self.metric.update(out.predictions, out.targets)

    def compute(self) -> Tensor:
        """Return the metric, a scalar."""
        value: Tensor = self.metric.compute()
        return value

    def reset(self) -> None:
        """Forget all rows."""
        super().reset()
        self.metric.reset()


def _parts(
    model: nn.Module, batch: Mapping[str, Any]
) -> Iterator[tuple[str, nn.Module, Mapping[str, Any]]]:
    """Yield each task's name, model and part of a batch, within the reach of its adapter."""
    for name, part in batch.items():
        if part is not None:  # a task without held-out rows left
            view = model.get_submodule(name)
            with mixed(view, [name]):
                yield name, view, part


def _together(found: Mapping[str, StepOutput]) -> StepOutput:
    loss = torch.stack([out.loss for out in found.values()]).mean()
    return StepOutput(loss, list(found.items()), None)


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[\w-]+", name) or hasattr(nn.ModuleDict(), name):
        raise ConfigError(
            f"`task.tasks` must have names of letters, digits, - and _, which folders and modules "
            f"are called by, but has {name!r}: choose another."
        )


def _built(spec: Mapping[str, Any], name: str) -> Task:
    return instantiate_as(Task, spec, f"task.tasks.{name}")  # type: ignore[type-abstract]
