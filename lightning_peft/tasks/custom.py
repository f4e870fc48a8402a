"""A task of your own: a plain function from a model and a batch to a loss."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_peft.baseline import Baseline, untouched_baseline
from lightning_peft.config import TARGET, Unbuilt, find_function, instantiate_as, target_of
from lightning_peft.errors import ConfigError, NonFiniteError, near_misses
from lightning_peft.report import Example
from lightning_peft.structure.anatomy import head_parameters
from lightning_peft.tasks.task import StepOutput, Task

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from lightning_peft.models import ModelSource

_LOSS = "val/loss"


@runtime_checkable
class Connectable(Protocol):
    """A data module that wants what the model reads with."""

    def connect(self, processor: Any) -> Any:
        """Take the model's tokenizer."""


class CustomTask(Task):
    """Whatever `loss(model, batch)` computes, with metrics of torchmetrics.

    The function gets the model with its adapter and a batch as the data module made it. It returns
    the loss, a finite scalar, or the loss, predictions and targets, which the metrics compare; a
    `StepOutput` is the latter. Any LightningDataModule will do: one with a method
    `connect(tokenizer)` gets the model's tokenizer by it.

    Example::

        def loss(model, batch):
            scores = model(**model_inputs(batch)).logits.squeeze(-1)
            return mse_loss(scores, batch["labels"]), scores, batch["labels"]

        task = CustomTask(loss, metrics={"pearson": {"_target_": "torchmetrics.regression.PearsonCorrCoef"}})

    Args:
        loss: the function, or its dotted path in a package that is allowed (`allow_packages`).
        predict: function of a model and a batch without targets, or its path; it returns for each
            row a dictionary that a person can read, or a value. Without it nothing is predicted.
        metrics: by name the `_target_` of a class of torchmetrics, and its settings.
        monitor: the metric that chooses the best checkpoint: `val/loss`, or `val/<metric>`.
        mode: whether the better value of it is the smaller (min) or the larger (max).
        auto_class: class of transformers that the base is loaded by.
        config: settings of the model's own config, for example `{num_labels: 1}`.

    Raises:
        ConfigError: a function cannot be found, or a setting is out of its range.
    """  # noqa: E501  # a call is easier to copy in one line

    suffix = ".jsonl"

    def __init__(
        self,
        loss: str | Callable[..., Any],
        predict: str | Callable[..., Any] | None = None,
        metrics: Unbuilt | None = None,
        monitor: str = _LOSS,
        mode: Literal["min", "max"] = "min",
        auto_class: str = "AutoModel",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._loss = _function(loss, "task.loss")
        self._predict = _function(predict, "task.predict") if predict is not None else None
        self.predicts = predict is not None
        self.described = {name: dict(spec) for name, spec in (metrics or {}).items()}
        known = [_LOSS, *(f"val/{name}" for name in self.described)]
        if monitor not in known:
            raise ConfigError(
                f"`task.monitor` must be one of {', '.join(known)}, but is {monitor!r} instead."
                f"{near_misses(monitor, known)}"
            )
        self.monitor, self.mode = monitor, mode
        self.auto_class, self.config = auto_class, dict(config or {})
        self.metrics()

    def equip(self, data: Any, source: "ModelSource") -> None:
        if isinstance(data, Connectable):
            data.connect(source.tokenizer())

    def load_model(self, source: "ModelSource") -> nn.Module:
        return source.load(self.auto_class, **self.config)

    def metrics(self) -> MetricCollection:
        found: dict[str, Metric | MetricCollection] = {
            name: instantiate_as(Metric, spec, f"task.metrics.{name}")  # type: ignore[type-abstract]
            for name, spec in self.described.items()
        }
        try:
            return MetricCollection(found)
        except KeyError as error:  # of `nn.ModuleDict`: a dot, or the name of one of its methods
            raise ConfigError(
                f"`task.metrics` must have names that torchmetrics takes, but has "
                f"{', '.join(found)}: {error.args[0]}."
            ) from error

    def step(self, model: nn.Module, batch: Any) -> StepOutput:
        """Return what the function gives.

        Raises:
            ConfigError: It is neither a scalar nor a loss with predictions and targets.
        """
        return _checked(self._loss(model, batch), _path(self._loss), bool(self.described))

    def evaluate(self, model: nn.Module, batch: Any) -> StepOutput:
        """Return what the function gives for held-out rows.

        Raises:
            NonFiniteError: The loss is NaN or infinite.
        """
        found = self.step(model, batch)
        if not torch.isfinite(found.loss):  # in training the guard before each step looks at it
            raise NonFiniteError(
                f"`{_path(self._loss)}` must return a finite loss, but gave {float(found.loss)} "
                f"for a batch that is held out."
            )
        return found

    def predictions(self, model: nn.Module, batch: Any) -> list[dict[str, Any]]:
        if self._predict is None:
            raise ConfigError(
                "`task.predict` must be a function of a model and a batch to predict, but is None "
                "instead: train with one, or give it as `task.predict=my_package.my_function`."
            )
        found = self._predict(model, batch)
        if isinstance(found, Tensor):
            found = found.tolist()
        if not isinstance(found, Sequence) or isinstance(found, str):
            raise ConfigError(
                f"`{_path(self._predict)}` must return a list with what is predicted for each row, "
                f"but returned {type(found).__name__} instead."
            )
        return [row if isinstance(row, dict) else {"prediction": row} for row in found]

    def example(self, read: Any, target: Any, prediction: Mapping[str, Any]) -> Example | None:
        return None  # what is right, nobody but the function knows

    def baselines(
        self,
        model: nn.Module,
        train: "DataLoader[Any]",
        validation: "DataLoader[Any]",
        test: "DataLoader[Any] | None",
    ) -> list[Baseline]:
        if head_parameters(model) or not self.described:  # a fresh head says nothing yet
            return []
        return [untouched_baseline(model, self, validation, test)]

    def check(self, model: nn.Module, data: Any) -> None:
        """Accept any data: the function is the judge of it."""

    def to_spec(self) -> dict[str, Any]:
        return {
            TARGET: target_of(type(self)),
            "loss": _path(self._loss),
            "predict": _path(self._predict) if self._predict is not None else None,
            "metrics": self.described,
            "monitor": self.monitor,
            "mode": self.mode,
            "auto_class": self.auto_class,
            "config": self.config,
        }


def _function(given: str | Callable[..., Any], where: str) -> Callable[..., Any]:
    if isinstance(given, str):
        return find_function(given, where)
    path = _path(given)
    if not all(part.isidentifier() for part in path.split(".")):
        raise ConfigError(
            f"`{where}` must be a function at the top of a module, so that a checkpoint can name "
            f"it, but is {path} instead."
        )
    return given


def _path(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{getattr(function, '__qualname__', function)}"


def _checked(returned: Any, name: str, compares: bool) -> StepOutput:
    """Return what a loss function returned in the form of a step.

    Raises:
        ConfigError: It is something else, or lacks what the metrics compare.
    """
    weight = None
    if isinstance(returned, StepOutput):
        returned, weight = returned[:3], returned.weight
    loss, *rest = returned if isinstance(returned, tuple) else (returned,)
    if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point() or _odd(rest):
        raise ConfigError(
            f"`{name}` must return the loss as a scalar tensor, or (loss, predictions, targets), "
            f"but returned {_what(returned)} instead."
        )
    if compares and not rest:
        raise ConfigError(
            f"`{name}` must return (loss, predictions, targets), which `task.metrics` compare, but "
            f"returned the loss alone."
        )
    predictions, targets = cast(Any, rest or ((), None))
    return StepOutput(loss, predictions, targets, weight)


def _odd(rest: list[Any]) -> bool:
    return len(rest) not in (0, 2)


def _what(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_what, value))})"
    return type(value).__name__
