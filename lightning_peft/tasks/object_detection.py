"""Object detection: the class of each object in an image, and the box around it."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_peft.baseline import Baseline
from lightning_peft.errors import ConfigError, require
from lightning_peft.report import Example
from lightning_peft.tasks.box_matches import agreement
from lightning_peft.tasks.box_scores import BoxScore, score_names
from lightning_peft.tasks.boxes_drawn import draw_objects
from lightning_peft.tasks.constant_boxes import constant_boxes
from lightning_peft.tasks.detectors import decoded, is_detector, load_detector, takes_mask
from lightning_peft.tasks.labelled import LabelledTask
from lightning_peft.tasks.outputs import check_outputs, require_labels
from lightning_peft.tasks.task import StepOutput

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from lightning_peft.models import ModelSource

_MOST = 100  # objects of an image that are looked at, as in COCO's evaluation


class ObjectDetection(LabelledTask):
    """Find the objects of an image: their classes and boxes.

    The model is a detector of transformers: it takes `pixel_values`, `labels` and, if it knows
    padding, `pixel_mask`, and returns its own `loss` (of a matching between queries and objects),
    `logits` `(batch, queries, classes)` and `pred_boxes` `(batch, queries, 4)`. The metrics are
    COCO's average precision and recall.

    Args:
        labels: The classes in the order of the logits; None takes the data's by `connect`.
        detector: Settings of a new detector on a pretrained backbone, see `load_detector`; None
            where the model is a detector already.
        threshold: Score from which on an object is written, drawn and counted by class.
    """

    monitor = "val/map"
    mode = "max"
    suffix = ".jsonl"
    setting = "classes"

    def __init__(
        self,
        labels: Sequence[str] | None = None,
        detector: Mapping[str, Any] | None = None,
        threshold: float = 0.5,
    ) -> None:
        if not 0 <= threshold <= 1:
            raise ConfigError(f"`threshold` must be a score up to 1, but is {threshold} instead.")
        self.labels = tuple(labels) if labels is not None else None
        self.detector = dict(detector) if detector is not None else None
        self.threshold = threshold

    def equip(self, data: Any, source: "ModelSource") -> None:
        data.connect(self._processor(source), labels=self.labels)

    def load_model(self, source: "ModelSource") -> nn.Module:
        return load_detector(source, self.named_labels(), self.detector)

    def metrics(self) -> MetricCollection:
        require("pycocotools", "detection")  # now, and not after an epoch
        classes = self.named_labels()
        return MetricCollection({name: BoxScore(classes, name) for name in score_names(classes)})

    def step(self, model: nn.Module, batch: Mapping[str, Any]) -> StepOutput:
        """Return the model's own loss, and the boxes in pixels."""
        require_labels(batch, "objects")
        within = takes_mask(model)
        outputs = model(**_inputs(batch, within), labels=_targets(batch, within))
        found = self._found(outputs, batch, within)
        return StepOutput(outputs.loss, found, batch["row_objects"])

    def predictions(self, model: nn.Module, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return for each image its `objects`, the surest first: `label`, `score` and `box`.

        A box is left, top, right and bottom in pixels of the file.
        """
        classes, within = self.named_labels(), takes_mask(model)
        rows = []
        for found in self._found(model(**_inputs(batch, within)), batch, within):
            boxes = found["boxes"].tolist()
            seen = zip(found["labels"].tolist(), found["scores"].tolist(), boxes, strict=True)
            objects = [
                {
                    "label": classes[label],
                    "score": round(score, 4),
                    "box": [round(x, 1) for x in box],
                }
                for label, score, box in seen
                if score >= self.threshold
            ]
            rows.append({"objects": objects})
        return rows

    def draw(self, read: str, prediction: Mapping[str, Any], folder: Path, number: int) -> None:
        """Draw the objects on a copy of the image, `<number>-<its name>.png` in `folder`."""
        path = folder / f"{number:05d}-{Path(read).stem}.png"
        draw_objects(read, prediction["objects"], self.named_labels(), path)

    def example(
        self, read: str, target: Sequence[Mapping[str, Any]], prediction: Mapping[str, Any]
    ) -> Example:
        gold = _counted([one["label"] for one in target if not one["ignored"]])
        found = _counted([one["label"] for one in prediction["objects"]])
        return Example(text=Path(read).name, gold=gold, predicted=found)

    def by_class(
        self,
        targets: Sequence[Sequence[Mapping[str, Any]]],
        predictions: Sequence[Mapping[str, Any]],
    ) -> dict[str, dict[str, float]]:
        return agreement(targets, [row["objects"] for row in predictions], self.named_labels())

    def baselines(
        self,
        model: nn.Module,
        train: "DataLoader[Any]",
        validation: "DataLoader[Any]",
        test: "DataLoader[Any] | None",
    ) -> list[Baseline]:
        """Return what it is worth to draw the same boxes on every image."""
        started = time.perf_counter()
        shares = constant_boxes(train, len(self.named_labels()))
        scores = []
        for loader in (validation, test):
            metrics = self.metrics()
            for batch in loader or ():
                sizes = batch["row_sizes"].repeat(1, 2)  # (batch, 4)
                same = [shares | {"boxes": shares["boxes"] * size} for size in sizes]
                metrics.update(same, batch["row_objects"])
            scores.append({k: float(v) for k, v in metrics.compute().items()} if loader else {})
        return [
            Baseline(
                name="the same boxes on all images",
                setting={"boxes": float(len(shares["boxes"]))},
                validation=scores[0],
                test=scores[1],
                trained=0,
                seconds=time.perf_counter() - started,
            )
        ]

    def check(self, model: nn.Module, data: Any) -> None:
        """Compare the classes of the data with the head.

        Raises:
            ConfigError: The model is no detector.
            DataError: The head has another number of classes.
        """
        if not is_detector(model):
            raise ConfigError(
                f"`model` must be a detector of transformers, such as YOLOS or DETR, but is "
                f"{type(model).__name__}: take another, or set `task.detector` to build one on it."
            )
        self.connect(data)
        check_outputs(model, self.named_labels(), "data.classes")

    def to_spec(self) -> dict[str, Any]:
        from lightning_peft.config import target_of

        labels = list(self.labels) if self.labels is not None else None
        settings = {"detector": self.detector, "threshold": self.threshold}
        return {"_target_": target_of(type(self)), "labels": labels, **settings}

    def _processor(self, source: "ModelSource") -> Any:
        """Return the model's image processor; a new detector's is DETR's, which crops nothing."""
        own: Any = source.image_processor()
        if self.detector is None:
            return own
        from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil

        return DetrImageProcessorPil(image_mean=own.image_mean, image_std=own.image_std)

    def _found(
        self, outputs: Any, batch: Mapping[str, Any], within: bool
    ) -> list[dict[str, Tensor]]:
        """Return the objects of each image, their boxes in pixels of the file."""
        logits, boxes = outputs.logits, outputs.pred_boxes
        if not within:  # the model saw the padding as a part of the image
            boxes = boxes / batch["row_shares"].repeat(1, 2).unsqueeze(1)
        found = decoded(logits.detach(), boxes.detach(), len(self.named_labels()), _MOST)
        sizes = batch["row_sizes"].repeat(1, 2)  # (batch, 4)
        return [
            one | {"boxes": one["boxes"] * size} for one, size in zip(found, sizes, strict=True)
        ]


def _inputs(batch: Mapping[str, Any], within: bool) -> dict[str, Tensor]:
    pixels = {"pixel_values": batch["pixel_values"]}
    return pixels | ({"pixel_mask": batch["pixel_mask"]} if within else {})


def _targets(batch: Mapping[str, Any], within: bool) -> list[dict[str, Tensor]]:
    """Return the labels with boxes as shares of what the model sees."""
    if within:
        return list(batch["labels"])
    shares = batch["row_shares"].repeat(1, 2)  # (batch, 4)
    return [
        one | {"boxes": one["boxes"] * share}
        for one, share in zip(batch["labels"], shares, strict=True)
    ]


def _counted(labels: Sequence[str]) -> str:
    counts = sorted(Counter(labels).items())
    return ", ".join(f"{count} {label}" for label, count in counts) or "nothing"
