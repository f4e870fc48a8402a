"""One label for each text: sentiment, topic, intent, or the relation of a pair of texts."""

from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_peft.tasks.outputs import load_classifier
from lightning_peft.tasks.single_label import SingleLabel

if TYPE_CHECKING:
    from lightning_peft.models import ModelSource


class SequenceClassification(SingleLabel):
    """Choose one of several labels for each text, by cross-entropy.

    The model takes `input_ids` and `attention_mask`, both `(batch, tokens)`, and returns an object
    with `logits` of shape `(batch, labels)`.

    Args:
        labels: Their names in the order of the logits; None takes the data's by `connect`.
        class_weights: How much a text of each label counts in the loss; `balanced` gives all labels
            the same total by their number of training rows; None counts each text once.
    """

    rows = "texts"
    kind = "sequence classification"

    def equip(self, data: Any, source: "ModelSource") -> None:
        data.connect(source.tokenizer(), labels=self.labels)

    def load_model(self, source: "ModelSource") -> nn.Module:
        labels = self.named_labels()
        return load_classifier(source, labels, "AutoModelForSequenceClassification")
