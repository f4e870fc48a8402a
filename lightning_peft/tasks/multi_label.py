"""Any number of labels for each text: topics, emotions, kinds of toxicity."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics import MetricCollection
from torchmetrics.classification import MultilabelExactMatch, MultilabelF1Score
from torchmetrics.functional.classification import (
    multilabel_f1_score,
    multilabel_precision,
    multilabel_recall,
)

from lightning_peft.baseline import Baseline, frozen_baselines
from lightning_peft.errors import ConfigError, DataError
from lightning_peft.report import Example
from lightning_peft.tasks.labelled import LabelledTask
from lightning_peft.tasks.outputs import (
    check_outputs,
    load_classifier,
    logits_of,
    require_labels,
)
from lightning_peft.tasks.single_label import LabelledData
from lightning_peft.tasks.task import StepOutput

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from lightning_peft.models import ModelSource


class MultiLabelClassification(LabelledTask):
    """Decide for each label whether a text has it, by binary cross-entropy.

    The model takes `input_ids` and `attention_mask`, both `(batch, tokens)`, and returns an object
    with `logits` of shape `(batch, labels)`. A text has the labels whose probability is at least
    `threshold`. The metrics are micro and macro F1, and `exact`, the share of texts whose labels
    are all right.

    Args:
        labels: Their names in the order of the logits; None takes the data's by `connect`.
        threshold: Probability from which on a text has a label.
    """

    monitor = "val/f1"
    mode = "max"

    def __init__(self, labels: Sequence[str] | None = None, threshold: float = 0.5) -> None:
        if not 0 < threshold < 1:
            raise ConfigError(f"`threshold` must be between 0 and 1, but is {threshold} instead.")
        self.labels = tuple(labels) if labels is not None else None
        self.threshold = threshold

    def equip(self, data: Any, source: "ModelSource") -> None:
        data.connect(source.tokenizer(), labels=self.labels)

    def load_model(self, source: "ModelSource") -> nn.Module:
        return load_classifier(
            source,
            self.named_labels(),
            "AutoModelForSequenceClassification",
            problem_type="multi_label_classification",
        )

    def metrics(self) -> MetricCollection:
        count = len(self.named_labels())
        return MetricCollection(
            {
                "f1": MultilabelF1Score(count, average="micro"),
                "f1_macro": MultilabelF1Score(count, average="macro"),
                "exact": MultilabelExactMatch(count),
            }
        )

    def step(self, model: nn.Module, batch: Mapping[str, Tensor]) -> StepOutput:
        """Return the mean binary cross-entropy, and 0 or 1 `(batch, labels)` twice."""
        require_labels(batch, "labels")
        logits, targets = self._logits(model, batch), batch["labels"]
        loss = binary_cross_entropy_with_logits(logits, targets)
        chosen = logits.sigmoid() >= self.threshold
        return StepOutput(loss, chosen.long(), targets.long())

    def predictions(self, model: nn.Module, batch: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """Return for each text its labels, and the probability of each label there is."""
        names = self.named_labels()
        return [
            {
                "labels": [n for n, p in zip(names, row, strict=True) if p >= self.threshold],
                "probabilities": dict(zip(names, row, strict=True)),
            }
            for row in self._logits(model, batch).sigmoid().tolist()
        ]

    def example(self, read: str, target: list[str], prediction: Mapping[str, Any]) -> Example:
        gold, predicted = (", ".join(names) or "-" for names in (target, prediction["labels"]))
        return Example(text=read, gold=gold, predicted=predicted)

    def by_class(
        self, targets: Sequence[Sequence[str]], predictions: Sequence[Mapping[str, Any]]
    ) -> dict[str, dict[str, float]]:
        names = self.named_labels()
        gold = _marks(targets, names)
        chosen = _marks([row["labels"] for row in predictions], names)
        settings: dict[str, Any] = {"num_labels": len(names), "average": None}
        columns = {
            "precision": multilabel_precision(chosen, gold, **settings).tolist(),
            "recall": multilabel_recall(chosen, gold, **settings).tolist(),
            "f1": multilabel_f1_score(chosen, gold, **settings).tolist(),
            "texts": gold.sum(0).tolist(),
        }
        return {
            name: {column: values[i] for column, values in columns.items()}
            for i, name in enumerate(names)
        }

    def baselines(
        self,
        model: nn.Module,
        train: "DataLoader[Any]",
        validation: "DataLoader[Any]",
        test: "DataLoader[Any] | None",
    ) -> list[Baseline]:
        return frozen_baselines(model, self, train, validation, test, pooled=False)

    def check(self, model: nn.Module, data: LabelledData) -> None:
        """Compare the labels of the data with the head, and look for labels without rows.

        Raises:
            DataError: The head has another number of labels, or no training row has any.
        """
        self.connect(data)
        check_outputs(model, self.named_labels(), "data.labels")
        if not any(data.label_counts("train").values()):
            raise DataError("`data.label` must give labels in training, but no row has any.")

    def to_spec(self) -> dict[str, Any]:
        from lightning_peft.config import target_of

        labels = list(self.labels) if self.labels is not None else None
        own = {"labels": labels, "threshold": self.threshold}
        return {"_target_": target_of(type(self)), **own}

    def _logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return logits_of(model, batch, "(batch, labels)", "sequence classification")


def _marks(rows: Sequence[Sequence[str]], names: Sequence[str]) -> Tensor:
    """Return 1 where a row has a label, `(rows, labels)`."""
    return torch.tensor([[int(name in row) for name in names] for row in rows])
