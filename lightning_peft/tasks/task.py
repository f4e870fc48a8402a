"""What a batch means: loss, predictions and metrics. One task, one file."""

import abc
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from torch import Tensor, nn

from lightning_peft.report import Example

if TYPE_CHECKING:
    from pathlib import Path

    from torch.utils.data import DataLoader
    from torchmetrics import MetricCollection

    from lightning_peft.baseline import Baseline
    from lightning_peft.models import ModelSource


NUMBERS = "row_numbers"
"""Name in a batch of the row of the batch that each row of the model is of, `(rows of the model,)`.

It stands where a row of the batch is several of the model, windows of a long text for example.
"""


class StepOutput(NamedTuple):
    """What a task makes of one batch."""

    loss: Tensor
    """Mean over the batch, a scalar."""
    predictions: Tensor | Sequence[Any]
    """What the metrics compare, the batch first: a tensor, or for example texts or boxes."""
    targets: Tensor | Sequence[Any] | None
    """What is right, in the same form."""
    weight: int | None = None
    """What the loss is the mean of, tokens for example; None takes the number of targets."""


def model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what the model reads of a batch: all but `labels` and what begins with `row_`."""
    return {
        name: value
        for name, value in batch.items()
        if name != "labels" and not name.startswith("row_")
    }


def metric_name(name: str) -> str:
    """Return what stands in a metric's name for a class or a market: torchmetrics takes no dots."""
    return name.replace(".", "-")


class Task(abc.ABC):
    """Settings of a task, without modules or state, so that a checkpoint can store them."""

    monitor: str = "val/loss"
    """The metric by which the best checkpoint is chosen."""
    mode: str = "min"
    """Whether the better value of `monitor` is the smaller (min) or the larger (max)."""
    headline: str | None = None
    """The metric that reports compare models by, without a prefix; None takes `monitor`'s."""
    suffix: str = ".csv"
    """Ending of the file that predictions are written to, unless a user names another."""
    adapters: tuple[str, ...] = ()
    """Names of the adapters that it trains side by side, each on rows of its own; empty for one."""
    predicts: bool = True
    """Whether it can say of a row what a person can read."""

    @property
    def metric(self) -> str:
        """The metric that reports compare models by, without a prefix."""
        return self.headline or self.monitor.partition("/")[2]

    def equip(self, data: Any, source: "ModelSource") -> None:
        """Give the data what the model reads with: a tokenizer."""
        data.connect(source.tokenizer())

    def connect(self, data: Any) -> Self:
        """Take from the data what the settings leave open, for example the labels."""
        return self

    @abc.abstractmethod
    def load_model(self, source: "ModelSource") -> nn.Module:
        """Load the pretrained base with the head that the task needs."""

    @abc.abstractmethod
    def metrics(self) -> "MetricCollection":
        """Return fresh metrics that take `StepOutput.predictions` and `StepOutput.targets`."""

    @abc.abstractmethod
    def step(self, model: nn.Module, batch: Any) -> StepOutput:
        """Compute the loss and the predictions of a batch with targets."""

    def evaluate(self, model: nn.Module, batch: Any) -> StepOutput:
        """Compute what validation and test compare; what `step` computes, by default."""
        return self.step(model, batch)

    @abc.abstractmethod
    def predictions(self, model: nn.Module, batch: Any) -> list[dict[str, Any]]:
        """Return for each row of a batch what a person can read; targets are not needed."""

    def asked(self, loader: "DataLoader[Any]") -> "tuple[DataLoader[Any], Sequence[int] | None]":
        """Return batches of the rows to predict where a split is judged, and their numbers.

        All rows by default, in the loader's own batches; None stands for their numbers.
        """
        return loader, None

    def scores(
        self, targets: Sequence[Any], predictions: Sequence[Mapping[str, Any]]
    ) -> dict[str, float]:
        """Return metrics that only finished predictions have, as texts do; none by default.

        Args:
            targets: What is right for the rows that are `asked`, as `RowData.targets` gives it.
            predictions: One of `predictions` for each of them, made `readable`.
        """
        return {}

    @abc.abstractmethod
    def example(self, read: Any, target: Any, prediction: Mapping[str, Any]) -> Example | None:
        """Return one prediction as the report shows it; None for one that shows nothing.

        Args:
            read: What the model read, as `RowData.inputs` gives it.
            target: What is right, as `RowData.targets` gives it.
            prediction: One of `predictions`, made `readable`.
        """

    def readable(self, read: Any, prediction: dict[str, Any]) -> dict[str, Any]:
        """Complete a prediction by what only the row itself tells, before it is written."""
        return prediction

    def draw(  # noqa: B027
        self, read: Any, prediction: Mapping[str, Any], folder: "Path", number: int
    ) -> None:
        """Leave a picture of a prediction that was written; none by default.

        Args:
            read: What the model read, as `RowData.inputs` gives it.
            prediction: Made `readable`.
            folder: Beside the file of the predictions.
            number: Which row of that file it is, from 1.
        """

    def by_class(
        self, targets: Sequence[Any], predictions: Sequence[Mapping[str, Any]]
    ) -> dict[str, dict[str, float]]:
        """Return the scores of each label, or of what else the report's second table has."""
        return {}

    def by_group(self, metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """Return the metrics of each group of rows, for the report's second table instead."""
        return {}

    def baselines(
        self,
        model: nn.Module,
        train: "DataLoader[Any]",
        validation: "DataLoader[Any]",
        test: "DataLoader[Any] | None",
    ) -> "list[Baseline]":
        """Return what the base is worth without a method, the best first; none by default.

        Raises:
            ConfigError: The model has no form that could be measured so.
        """
        return []

    @abc.abstractmethod
    def check(self, model: nn.Module, data: Any) -> None:
        """Compare the model with the data before any training.

        Raises:
            ConfigError: The model does not fit the task.
            DataError: The data does not fit the task or the model.
        """

    @abc.abstractmethod
    def to_spec(self) -> dict[str, Any]:
        """Describe the task in plain containers, for `lightning_peft.config.instantiate`."""
