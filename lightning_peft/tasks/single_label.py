"""One label for each row, whatever a row is."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from torchmetrics.functional.classification import (
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
    multiclass_stat_scores,
)

from lightning_peft.baseline import Baseline, frozen_baselines
from lightning_peft.errors import ConfigError, DataError
from lightning_peft.report import Example
from lightning_peft.tasks.labelled import LabelledTask
from lightning_peft.tasks.outputs import check_outputs, logits_of, require_labels
from lightning_peft.tasks.task import StepOutput

if TYPE_CHECKING:
    from torch.utils.data import DataLoader


class LabelledData(Protocol):
    """What the task asks of a data module."""

    @property
    def labels(self) -> Sequence[str]:
        """The labels in the order of the model's outputs."""

    def label_counts(self, split: str) -> Mapping[str, int]:
        """Return how many rows of a split have each label."""


class SingleLabel(LabelledTask):
    """Choose one of several labels for each row, by cross-entropy.

    The model returns an object with `logits` of shape `(batch, labels)`. A task says in its class
    what its rows are called and what its model must be for, and loads the two.

    Args:
        labels: Their names in the order of the logits; None takes the data's by `connect`.
        class_weights: How much a row of each label counts in the loss; `balanced` gives all labels
            the same total by their number of training rows; None counts each row once.
    """

    monitor = "val/accuracy"
    mode = "max"
    rows: str
    """What rows are called."""
    kind: str
    """What the model must be for."""

    def __init__(
        self,
        labels: Sequence[str] | None = None,
        class_weights: Mapping[str | int, float] | Literal["balanced"] | None = None,
    ) -> None:
        if labels is not None and len(labels) < 2:
            raise ConfigError(f"`labels` must be two or more names, but is {list(labels)} instead.")
        self.labels = tuple(str(label) for label in labels) if labels is not None else None
        self.class_weights: dict[str, float] | Literal["balanced"] | None = None
        if isinstance(class_weights, Mapping):
            self.class_weights = {str(name): float(w) for name, w in class_weights.items()}
        else:
            self.class_weights = class_weights
        if isinstance(self.class_weights, dict) and min(self.class_weights.values(), default=0) < 0:
            raise ConfigError(f"`class_weights` must be 0 or more, but is {class_weights} instead.")

    def connect(self, data: LabelledData) -> Self:
        """Take the labels of the data, unless the settings give them.

        Raises:
            DataError: Both give labels, and they differ.
        """
        super().connect(data)
        found = self.named_labels()
        if self.class_weights == "balanced":
            self.class_weights = _balanced(data.label_counts("train"))
        elif self.class_weights is not None and set(self.class_weights) != set(found):
            raise DataError(
                f"`class_weights` must be given for each label ({', '.join(found)}), but is for "
                f"{', '.join(self.class_weights)} instead."
            )
        return self

    def metrics(self) -> MetricCollection:
        classes = len(self.named_labels())
        return MetricCollection(
            {
                "accuracy": MulticlassAccuracy(classes, average="micro"),
                "f1": MulticlassF1Score(classes, average="macro"),
            }
        )

    def step(self, model: nn.Module, batch: Mapping[str, Tensor]) -> StepOutput:
        """Return the mean cross-entropy, the chosen labels `(batch,)` and the right ones."""
        require_labels(batch, "labels")
        logits, targets = self._logits(model, batch), batch["labels"]
        loss = cross_entropy(logits, targets, self._weights(logits))
        return StepOutput(loss, logits.argmax(-1), targets)

    def predictions(self, model: nn.Module, batch: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """Return for each row its label, that label's probability, and all probabilities."""
        labels = self.named_labels()
        probabilities = self._logits(model, batch).softmax(-1)
        scores, choices = probabilities.max(-1)
        rows = zip(choices.tolist(), scores.tolist(), probabilities.tolist(), strict=True)
        return [
            {
                "label": labels[choice],
                "score": score,
                "probabilities": dict(zip(labels, row, strict=True)),
            }
            for choice, score, row in rows
        ]

    def example(self, read: str, target: str, prediction: Mapping[str, Any]) -> Example:
        return Example(
            text=read, gold=target, predicted=prediction["label"], score=prediction["score"]
        )

    def by_class(
        self, targets: Sequence[str], predictions: Sequence[Mapping[str, Any]]
    ) -> dict[str, dict[str, float]]:
        numbers = {label: number for number, label in enumerate(self.named_labels())}
        chosen = torch.tensor([numbers[row["label"]] for row in predictions])
        rows = self.report(chosen, torch.tensor([numbers[label] for label in targets]))
        return {row.pop("label"): row for row in rows}

    def baselines(
        self,
        model: nn.Module,
        train: "DataLoader[Any]",
        validation: "DataLoader[Any]",
        test: "DataLoader[Any] | None",
    ) -> list[Baseline]:
        return frozen_baselines(model, self, train, validation, test)

    def report(self, predictions: Tensor, targets: Tensor) -> list[dict[str, Any]]:
        """Return precision, recall, F1 and the number of rows of each label, shapes `(rows,)`."""
        labels = self.named_labels()
        settings: dict[str, Any] = {"num_classes": len(labels), "average": None}
        columns = {
            "precision": multiclass_precision(predictions, targets, **settings).tolist(),
            "recall": multiclass_recall(predictions, targets, **settings).tolist(),
            "f1": multiclass_f1_score(predictions, targets, **settings).tolist(),
            self.rows: multiclass_stat_scores(predictions, targets, **settings)[:, 4].tolist(),
        }
        return [
            {"label": label} | {name: values[i] for name, values in columns.items()}
            for i, label in enumerate(labels)
        ]

    def check(self, model: nn.Module, data: LabelledData) -> None:
        """Compare the labels of the data with the head, and look for labels without rows.

        Raises:
            ConfigError: The model has no classification head of a known size.
            DataError: The head has another number of labels, names them otherwise, or all training
                rows have the same one.
        """
        self.connect(data)
        labels = self.named_labels()
        check_outputs(model, labels, "data.labels")
        _check_names(model, labels)
        counts = data.label_counts("train")
        present = [label for label, count in counts.items() if count]
        if len(present) < 2:
            raise DataError(
                f"`data.label` must have at least two different labels in training, but all "
                f"{sum(counts.values()):,} rows have {present} instead."
            )

    def to_spec(self) -> dict[str, Any]:
        from lightning_peft.config import target_of

        labels = list(self.labels) if self.labels is not None else None
        own = {"labels": labels, "class_weights": self.class_weights}
        return {"_target_": target_of(type(self)), **own}

    def _weights(self, logits: Tensor) -> Tensor | None:
        """Return the weight of each label, `(labels,)`; None where all count the same."""
        if not isinstance(self.class_weights, dict):
            return None
        return logits.new_tensor([self.class_weights[label] for label in self.named_labels()])

    def _logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return logits_of(model, batch, "(batch, labels)", self.kind)


def _balanced(counts: Mapping[str, int]) -> dict[str, float]:
    """Return n / (labels · count) for each label, 0 for one without rows."""
    total = sum(counts.values()) / len(counts)
    return {label: total / count if count else 0.0 for label, count in counts.items()}


def _check_names(model: nn.Module, labels: tuple[str, ...]) -> None:
    """Compare the names with those that a trained head carries; LABEL_0 says nothing."""
    names = getattr(getattr(model, "config", None), "id2label", None) or {}
    known = tuple(str(names.get(i)) for i in range(len(labels)))
    numbered = tuple(f"LABEL_{i}" for i in range(len(labels)))
    if names and known != numbered and sorted(known) == sorted(labels) and known != labels:
        raise DataError(
            f"`data.labels` must be in the order of the model's outputs ({', '.join(known)}), but "
            f"is {', '.join(labels)} instead: set `data.labels=[{','.join(known)}]`."
        )
