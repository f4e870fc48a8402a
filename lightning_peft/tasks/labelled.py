"""What tasks share whose model has an output for each of several names."""

from collections.abc import Sequence
from typing import Any, Self

from lightning_peft.errors import ConfigError, DataError
from lightning_peft.tasks.task import Task


class LabelledTask(Task):
    """A task with labels, tags or classes, which its settings or the data give."""

    labels: tuple[str, ...] | None
    """They in the order of the model's outputs; None before the data is known."""
    setting: str = "labels"
    """What gives them under `data`."""

    def connect(self, data: Any) -> Self:
        """Take the labels of the data, which are those of the settings if these give any.

        Raises:
            DataError: They differ.
        """
        found = tuple(data.labels)
        if self.labels is not None and self.labels != found:
            wanted, others = map(self.spelled, (self.labels, found))
            raise DataError(
                f"`data.{self.setting}` must be those of the task in their order ({wanted}), but "
                f"is {others} instead: set `data.{self.setting}=[{wanted.replace(', ', ',')}]`."
            )
        self.labels = found
        return self

    def spelled(self, labels: Sequence[str]) -> str:
        """Return labels as the data's setting gives them."""
        return ", ".join(labels)

    def named_labels(self) -> tuple[str, ...]:
        """Return the labels.

        Raises:
            ConfigError: They are not known yet.
        """
        if self.labels is None:
            raise ConfigError(
                f"`labels` must be known, but is None instead: give "
                f"`{type(self).__name__}(labels=[...])`, or call `connect(data)` first."
            )
        return self.labels
