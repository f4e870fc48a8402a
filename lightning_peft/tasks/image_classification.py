"""One label for each image."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_peft.baseline import Baseline, frozen_baselines
from lightning_peft.data.pixels import unaugmented
from lightning_peft.report import Example
from lightning_peft.tasks.outputs import load_head
from lightning_peft.tasks.single_label import SingleLabel

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from lightning_peft.models import ModelSource


class ImageClassification(SingleLabel):
    """Choose one of several labels for each image, by cross-entropy.

    The model takes `pixel_values` of shape `(batch, channels, height, width)` and returns an object
    with `logits` of shape `(batch, labels)`.

    Args:
        labels: Their names in the order of the logits; None takes the data's by `connect`.
        class_weights: How much an image of each label counts in the loss; `balanced` gives all
            labels the same total by their number of training images; None counts each once.
    """

    rows = "images"
    kind = "image classification"

    def equip(self, data: Any, source: "ModelSource") -> None:
        data.connect(source.image_processor(), labels=self.labels)

    def load_model(self, source: "ModelSource") -> nn.Module:
        return load_head(source, self.named_labels(), "AutoModelForImageClassification")

    def example(self, read: str, target: str, prediction: Mapping[str, Any]) -> Example:
        shown = "/".join(Path(read).parts[-2:])  # the file and its folder
        return super().example(shown, target, prediction)

    def baselines(
        self,
        model: nn.Module,
        train: "DataLoader[Any]",
        validation: "DataLoader[Any]",
        test: "DataLoader[Any] | None",
    ) -> list[Baseline]:
        return frozen_baselines(model, self, unaugmented(train), validation, test)
