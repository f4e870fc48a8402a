"""Average precision of boxes, as COCO defines it, by pycocotools.

torchmetrics has the same in `MeanAveragePrecision`, which needs torchvision for a check alone; that
cannot be installed beside every build of torch, so the library under it is called here.
"""

import contextlib
import functools
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_peft.errors import DataError, require
from lightning_peft.tasks.task import metric_name

SCORES = ("map", "map_50", "mar")
_IOU_50 = 0  # place of the threshold 0.5 among 0.5, 0.55, ... 0.95
_ANY_SIZE, _ALL = 0, -1  # places among the sizes and the numbers of boxes that are told apart
_MOST = 100  # boxes of an image that count

Boxes = Mapping[str, Tensor]


class BoxScore(Metric):
    """One score of COCO's evaluation, between 0 and 1, or -1 where no class has an object.

    Args:
        classes: Their names by number.
        score: `map` (mean average precision over classes and over overlaps from 0.5 to 0.95),
            `map_50` (at an overlap of 0.5), `mar` (the recall that 100 boxes an image reach, over
            the same overlaps), or `ap_50_<class>`.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    predictions: list[Tensor]
    targets: list[Tensor]
    counts: list[Tensor]

    def __init__(self, classes: Sequence[str], score: str) -> None:
        super().__init__()
        self.classes, self.score = tuple(classes), score
        for state in ("predictions", "targets", "counts"):
            self.add_state(state, default=[], dist_reduce_fx="cat")

    def update(self, predictions: Sequence[Boxes], targets: Sequence[Boxes]) -> None:
        """Add images: `boxes` `(objects, 4)` in pixels and `labels` `(objects,)` of each.

        Predictions have `scores` too, targets whether they are `ignored`.
        """
        for found, right in zip(predictions, targets, strict=True):
            self.predictions.append(_rows(found, found["scores"]))
            self.targets.append(_rows(right, right["ignored"]))
            counts = [[len(found["boxes"]), len(right["boxes"])]]
            self.counts.append(torch.tensor(counts, device=self.device))

    def compute(self) -> Tensor:
        """Return the score, a scalar."""
        states = (self.predictions, self.targets, self.counts)
        content = (dim_zero_cat(state).cpu().numpy().tobytes() for state in states)
        scores = _scores(*content, self.classes)
        return torch.tensor(scores[self.score], device=self.device)


def score_names(classes: Sequence[str]) -> list[str]:
    """Return the names of all scores.

    Raises:
        DataError: Two classes would share one.
    """
    names = [*SCORES, *map(_class_score, classes)]
    if len(set(names)) < len(names):
        raise DataError(
            f"`data.classes` must differ in more than dots and dashes, which are the same in the "
            f"names of metrics, but are {', '.join(classes)}."
        )
    return names


def box_scores(
    predictions: Sequence[Tensor], targets: Sequence[Tensor], classes: Sequence[str]
) -> dict[str, float]:
    """Return COCO's scores.

    Args:
        predictions: For each image `(objects, 6)`: left, top, right, bottom, class and score.
        targets: The same, with 1 instead of a score where an object is to be ignored.
        classes: Their names by number.
    """
    evaluated = _evaluated(predictions, targets, len(classes))
    # Of shape (overlaps, recalls, classes, sizes, numbers), and recall without the second.
    precision = torch.from_numpy(evaluated["precision"])[:, :, :, _ANY_SIZE, _ALL]
    recall = torch.from_numpy(evaluated["recall"])[:, :, _ANY_SIZE, _ALL]
    by_class = [_mean(precision[_IOU_50, :, i]) for i in range(len(classes))]
    named = dict(zip(map(_class_score, classes), by_class, strict=True))
    total = {"map": _mean(precision), "map_50": _mean(precision[_IOU_50]), "mar": _mean(recall)}
    return total | named


def _class_score(name: str) -> str:
    return f"ap_50_{metric_name(name)}"


@functools.lru_cache(maxsize=2)  # the scores of one evaluation are asked for one after another
def _scores(
    predictions: bytes, targets: bytes, counts: bytes, classes: tuple[str, ...]
) -> dict[str, float]:
    predicted, right = np.frombuffer(counts, np.int64).reshape(-1, 2).T.tolist()
    found, objects = (
        torch.from_numpy(np.frombuffer(rows, np.float32).reshape(-1, 6).copy())
        for rows in (predictions, targets)
    )
    return box_scores(found.split(predicted), objects.split(right), classes)


def _rows(boxes: Boxes, last: Tensor) -> Tensor:
    columns = (boxes["labels"].unsqueeze(1), last.unsqueeze(1))
    return torch.cat([boxes["boxes"].float(), *(column.float() for column in columns)], 1)


def _mean(scores: Tensor) -> float:
    known = scores[scores > -1]  # -1 stands where a class has no object
    return float(known.mean()) if len(known) else -1.0


def _evaluated(
    predictions: Sequence[Tensor], targets: Sequence[Tensor], classes: int
) -> Mapping[str, Any]:
    require("pycocotools", "detection")
    coco = require("pycocotools.coco", "detection").COCO
    evaluation = require("pycocotools.cocoeval", "detection").COCOeval
    right = [
        _entry(row, image) | {"id": 0, "iscrowd": int(row[5]), "area": _area(row)}
        for image, rows in enumerate(targets)
        for row in rows.tolist()
    ]
    for number, entry in enumerate(right, 1):  # 0 means no match
        entry["id"] = number
    found = [
        _entry(row, image) | {"score": row[5]}
        for image, rows in enumerate(predictions)
        for row in rows.tolist()
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # which pycocotools writes to
        truth = _indexed(coco(), right, len(targets), classes)
        judged = truth.loadRes(found) if found else _indexed(coco(), [], len(targets), classes)
        evaluator = evaluation(truth, judged, "bbox")
        evaluator.params.maxDets = [1, 10, _MOST]
        evaluator.evaluate()
        evaluator.accumulate()
    result: Mapping[str, Any] = evaluator.eval
    return result


def _indexed(coco: Any, annotations: list[dict[str, Any]], images: int, classes: int) -> Any:
    coco.dataset = {
        "info": {},
        "images": [{"id": i} for i in range(images)],
        "categories": [{"id": i} for i in range(classes)],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco


def _entry(row: Sequence[float], image: int) -> dict[str, Any]:
    left, top, right, bottom, label = row[:5]
    box = [left, top, right - left, bottom - top]
    return {"image_id": image, "category_id": int(label), "bbox": box}


def _area(row: Sequence[float]) -> float:
    return (row[2] - row[0]) * (row[3] - row[1])
