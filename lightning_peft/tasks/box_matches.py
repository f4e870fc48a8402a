"""Which of the boxes that are written are right: precision, recall and F1 of each class."""

from collections.abc import Mapping, Sequence
from typing import Any

_OVERLAP = 0.5

Object = Mapping[str, Any]


def agreement(
    targets: Sequence[Sequence[Object]],
    predictions: Sequence[Sequence[Object]],
    classes: Sequence[str],
) -> dict[str, dict[str, float]]:
    """Return precision, recall, F1 and the number of objects by class.

    A box is right where it overlaps by half (intersection over union) with an object of its class
    that no surer box has taken. Objects that are to be ignored count on neither side. What is 0
    divided by 0 counts as 0.

    Args:
        targets: The objects of each image: `label`, `box` (left, top, right, bottom), `ignored`.
        predictions: What was found, the surest first: `label` and `box`.
        classes: In the order of the result.
    """
    scores = {}
    for name in classes:
        right = found = objects = 0
        for gold, seen in zip(targets, predictions, strict=True):
            own = [one for one in gold if one["label"] == name]
            hits, misses = _matched([one for one in seen if one["label"] == name], own)
            right, found = right + hits, found + hits + misses
            objects += sum(not one["ignored"] for one in own)
        precision = right / found if found else 0.0
        recall = right / objects if objects else 0.0
        both = precision + recall
        f1 = 2 * precision * recall / both if both else 0.0
        scores[name] = {"precision": precision, "recall": recall, "f1": f1, "objects": objects}
    return scores


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the intersection of two boxes divided by their union."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return shared / (sum(areas) - shared)


def _matched(seen: Sequence[Object], gold: Sequence[Object]) -> tuple[int, int]:
    """Return how many boxes are right and wrong; those on an ignored object are neither."""
    free = [one for one in gold if not one["ignored"]]
    ignored = [one for one in gold if one["ignored"]]
    right = wrong = 0
    for one in seen:
        best = max(free, key=lambda other: overlap(one["box"], other["box"]), default=None)
        if best is not None and overlap(one["box"], best["box"]) >= _OVERLAP:
            free.remove(best)
            right += 1
        elif not any(overlap(one["box"], other["box"]) >= _OVERLAP for other in ignored):
            wrong += 1
    return right, wrong
