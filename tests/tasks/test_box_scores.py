import copy

import pytest
import torch
from torchmetrics import MetricCollection

from lightning_peft.errors import DataError
from lightning_peft.tasks.box_matches import agreement, overlap
from lightning_peft.tasks.box_scores import BoxScore, box_scores, score_names

CLASSES = ("a", "b")


def boxes(*rows, last):
    """Return `(left, top, right, bottom, class, last)` as what a metric takes."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    column = table[:, 5].bool() if last == "ignored" else table[:, 5]
    return {"boxes": table[:, :4], "labels": table[:, 4].long(), last: column}


def right(*rows):
    return boxes(*rows, last="ignored")


def found(*rows):
    return boxes(*rows, last="scores")


def scored(predictions, targets):
    collection = {name: BoxScore(CLASSES, name) for name in score_names(CLASSES)}
    for metric in collection.values():
        for one in zip(predictions, targets, strict=True):
            metric.update(*([part] for part in one))
    return {name: metric.compute().item() for name, metric in collection.items()}


def test_boxes_that_are_right_score_one():
    target = [right([0, 0, 10, 10, 0, 0], [20, 20, 60, 50, 1, 0]), right()]
    scores = scored([found([0, 0, 10, 10, 0, 0.9], [20, 20, 60, 50, 1, 0.4]), found()], target)
    assert scores == dict.fromkeys(score_names(CLASSES), 1.0)


def test_names_of_classes_may_have_dots():
    classes = ["bus.v2", "car"]
    collection = MetricCollection({name: BoxScore(classes, name) for name in score_names(classes)})
    collection.update([found([0, 0, 9, 9, 0, 0.9])], [right([0, 0, 9, 9, 0, 0])])
    assert collection.compute()["ap_50_bus-v2"] == 1
    with pytest.raises(DataError, match=r"`data\.classes` must differ in more than dots"):
        score_names(["bus.v2", "bus-v2"])


def test_average_precision_is_that_of_the_definition():
    """Two objects; the surest box is right, the next wrong, the third right: 1/2 + 1/2 · 2/3."""
    target = [right([0, 0, 10, 10, 0, 0]), right([0, 0, 10, 10, 0, 0])]
    seen = [
        found([0, 0, 10, 10, 0, 0.9], [50, 50, 60, 60, 0, 0.8]),
        found([0, 0, 10, 10, 0, 0.7]),
    ]
    scores = scored(seen, target)
    # COCO reads the precision at 101 recalls, of which 51 lie at or below one half.
    assert scores["ap_50_a"] == pytest.approx((51 * 1 + 50 * 2 / 3) / 101, abs=1e-6)
    assert scores["map_50"] == scores["ap_50_a"]  # class b has no object
    assert scores["ap_50_b"] == -1
    assert scores["mar"] == 1


def test_a_loose_box_counts_at_low_overlaps_alone():
    target = [right([0, 0, 10, 10, 0, 0])]
    scores = scored([found([0, 0, 10, 6.1, 0, 0.9])], target)  # an overlap of 0.61
    assert scores["map_50"] == 1
    assert scores["map"] == pytest.approx(0.3)  # 0.5, 0.55 and 0.6 of ten


def test_what_is_ignored_counts_on_neither_side():
    target = [right([0, 0, 10, 10, 0, 0], [50, 50, 90, 90, 0, 1])]
    seen = [found([50, 50, 90, 90, 0, 0.9], [0, 0, 10, 10, 0, 0.8])]
    assert scored(seen, target)["map"] == 1


def test_nothing_found_scores_zero():
    assert scored([found()], [right([0, 0, 10, 10, 0, 0])])["map"] == 0


def test_a_metric_starts_anew_and_copies():
    metric = BoxScore(CLASSES, "map")
    metric.update([found([0, 0, 10, 10, 0, 0.9])], [right([0, 0, 10, 10, 0, 0])])
    assert copy.deepcopy(metric).compute() == 1
    metric.reset()
    metric.update([found([5, 5, 9, 9, 0, 0.9])], [right([0, 0, 10, 10, 0, 0])])
    assert metric.compute() == 0


def test_scores_equal_torchmetrics():
    detection = pytest.importorskip("torchmetrics.detection", exc_type=ImportError)
    pytest.importorskip("torchvision", exc_type=ImportError)
    generator = torch.Generator().manual_seed(5)
    reference = detection.MeanAveragePrecision(class_metrics=True)
    tables = []
    for _ in range(6):
        corners = torch.randint(0, 50, (5, 2), generator=generator).float()
        sizes = torch.randint(5, 40, (5, 2), generator=generator).float()
        labels = torch.randint(0, 2, (5, 1), generator=generator).float()
        gold = torch.cat([corners, corners + sizes, labels, torch.zeros(5, 1)], 1)
        moved = gold.clone()
        moved[:, :4] += torch.randint(-2, 3, (5, 4), generator=generator)
        moved[:, 5] = torch.rand(5, generator=generator)
        tables.append((moved, gold))
        seen, target = found(*moved.tolist()), right(*gold.tolist())
        reference.update([seen], [{k: target[k] for k in ("boxes", "labels")}])
    ours = box_scores(*zip(*tables, strict=True), CLASSES)
    theirs = reference.compute()
    assert ours["map"] == pytest.approx(theirs["map"].item(), abs=1e-6)
    assert ours["map_50"] == pytest.approx(theirs["map_50"].item(), abs=1e-6)
    assert ours["mar"] == pytest.approx(theirs["mar_100"].item(), abs=1e-6)


def test_overlaps_are_shares_of_the_union():
    assert overlap([0, 0, 10, 10], [5, 0, 15, 10]) == pytest.approx(1 / 3)
    assert overlap([0, 0, 10, 10], [10, 0, 20, 10]) == 0


def test_an_object_is_taken_once_and_classes_count_by_themselves():
    target = [
        [
            {"label": "a", "box": [0, 0, 10, 10], "ignored": False},
            {"label": "a", "box": [50, 50, 60, 60], "ignored": True},
            {"label": "b", "box": [20, 20, 30, 30], "ignored": False},
        ],
        [],
    ]
    seen = [
        [
            {"label": "a", "box": [0, 0, 10, 10]},
            {"label": "a", "box": [0, 0, 10, 9]},
            {"label": "a", "box": [50, 50, 60, 60]},
            {"label": "a", "box": [20, 20, 30, 30]},
        ],
        [],
    ]
    scores = agreement(target, seen, CLASSES)
    assert scores["a"] == {"precision": 1 / 3, "recall": 1, "f1": 0.5, "objects": 1}
    assert scores["b"] == {"precision": 0, "recall": 0, "f1": 0, "objects": 1}
