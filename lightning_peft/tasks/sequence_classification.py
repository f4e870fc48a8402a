"""One label for each text: sentiment, topic, intent, or the relation of a pair of texts."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self

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

from lightning_peft.errors import ConfigError, DataError
from lightning_peft.tasks.task import StepOutput, Task

if TYPE_CHECKING:
    from lightning_peft.models import ModelSource


class LabelledData(Protocol):
    """What the task asks of a data module."""

    @property
    def labels(self) -> Sequence[str]:
        """The labels in the order of the model's outputs."""

    def label_counts(self, split: str) -> Mapping[str, int]:
        """Return how many rows of a split have each label."""


class SequenceClassification(Task):
    """Choose one of several labels for each text, by cross-entropy.

    The model takes `input_ids` and `attention_mask`, both `(batch, tokens)`, and returns an object
    with `logits` of shape `(batch, labels)`.

    Args:
        labels: Their names in the order of the logits; None takes the data's by `connect`.
    """

    monitor = "val/accuracy"
    mode = "max"

    def __init__(self, labels: Sequence[str] | None = None) -> None:
        if labels is not None and len(labels) < 2:
            raise ConfigError(f"`labels` must be two or more names, but is {list(labels)} instead.")
        self.labels = tuple(str(label) for label in labels) if labels is not None else None

    def connect(self, data: LabelledData) -> Self:
        """Take the labels of the data, unless the settings give them.

        Raises:
            DataError: Both give labels, and they differ.
        """
        found = tuple(data.labels)
        if self.labels is not None and self.labels != found:
            raise DataError(
                f"`data.labels` must be those of the task in their order ({', '.join(self.labels)})"
                f", but is {', '.join(found)} instead: set `data.labels=[{','.join(self.labels)}]`."
            )
        self.labels = found
        return self

    def load_model(self, source: "ModelSource") -> nn.Module:
        labels = self._named_labels()
        model = source.load(
            "AutoModelForSequenceClassification",
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
        )
        # Decoders read the last token that is not padding, so they must know which one pads.
        if getattr(model.config, "pad_token_id", None) is None:
            model.config.pad_token_id = source.tokenizer().pad_token_id
        return model

    def metrics(self) -> MetricCollection:
        classes = len(self._named_labels())
        return MetricCollection(
            {
                "accuracy": MulticlassAccuracy(classes, average="micro"),
                "f1": MulticlassF1Score(classes, average="macro"),
            }
        )

    def step(self, model: nn.Module, batch: Mapping[str, Tensor]) -> StepOutput:
        """Return the mean cross-entropy, the chosen labels `(batch,)` and the right ones."""
        if "labels" not in batch:
            raise DataError(
                f"a batch must have `labels`, but has {', '.join(batch)} instead: give the data "
                f"module the column of the labels."
            )
        logits, targets = self._logits(model, batch), batch["labels"]
        return StepOutput(cross_entropy(logits, targets), logits.argmax(-1), targets)

    def predictions(self, model: nn.Module, batch: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """Return for each text its label, that label's probability, and all probabilities."""
        labels = self._named_labels()
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

    def report(self, predictions: Tensor, targets: Tensor) -> list[dict[str, Any]]:
        """Return precision, recall, F1 and the number of texts of each label, shapes `(texts,)`."""
        labels = self._named_labels()
        settings: dict[str, Any] = {"num_classes": len(labels), "average": None}
        columns = {
            "precision": multiclass_precision(predictions, targets, **settings).tolist(),
            "recall": multiclass_recall(predictions, targets, **settings).tolist(),
            "f1": multiclass_f1_score(predictions, targets, **settings).tolist(),
            "texts": multiclass_stat_scores(predictions, targets, **settings)[:, 4].tolist(),
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
        labels = self._named_labels()
        outputs = getattr(getattr(model, "config", None), "num_labels", None)
        if outputs is not None and outputs != len(labels):
            raise DataError(
                f"`data.labels` must be as many as the model has outputs ({outputs}), but is "
                f"{', '.join(labels)} instead."
            )
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
        return {"_target_": target_of(type(self)), "labels": labels}

    def _logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the logits in float32, shape `(batch, labels)`."""
        outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
        logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
        if logits is None or logits.dim() != 2:
            shape = None if logits is None else tuple(logits.shape)
            raise ConfigError(
                f"`model` must return `logits` of shape (batch, labels), but "
                f"{type(model).__name__} returns {shape} instead: use a model for sequence "
                f"classification."
            )
        return logits.float()

    def _named_labels(self) -> tuple[str, ...]:
        if self.labels is None:
            raise ConfigError(
                "`labels` must be known, but is None instead: give "
                "`SequenceClassification(labels=[...])`, or call `connect(data)` first."
            )
        return self.labels


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
