"""What a batch means: loss, predictions and metrics. One task, one file."""

import abc
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from torch import Tensor, nn

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

    from lightning_peft.models import ModelSource


class StepOutput(NamedTuple):
    """What a task makes of one batch."""

    loss: Tensor
    """Mean over the batch, a scalar."""
    predictions: Tensor
    """What the metrics compare, the batch first."""
    targets: Tensor | None
    """What is right, in the same form."""


class Task(abc.ABC):
    """Settings of a task, without modules or state, so that a checkpoint can store them."""

    monitor: str = "val/loss"
    """The metric by which the best checkpoint is chosen."""
    mode: str = "min"
    """Whether the better value of `monitor` is the smaller (min) or the larger (max)."""

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

    @abc.abstractmethod
    def predictions(self, model: nn.Module, batch: Any) -> list[dict[str, Any]]:
        """Return for each row of a batch what a person can read; targets are not needed."""

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
