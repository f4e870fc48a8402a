"""The bar that a detector must clear: the same boxes on every image, whatever it shows."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_peft.data.detection import centred


def constant_boxes(batches: Iterable[Mapping[str, Any]], classes: int) -> dict[str, Tensor]:
    """Return boxes of the mean size of each class on a grid that covers an image.

    A class has as many boxes as it has objects in an image on average, rounded up to a grid; each
    scores as often as the class occurs.

    Args:
        batches: Of training images.
        classes: How many there are.

    Returns:
        `boxes` `(objects, 4)`, left, top, right and bottom as shares of the image, `scores` and
        `labels`, both `(objects,)`.
    """
    images, found = 0, []
    for batch in batches:
        for size, objects in zip(batch["row_sizes"], batch["row_objects"], strict=True):
            images += 1
            shares = centred(objects["boxes"] / size.repeat(2))
            found.append(torch.cat([shares[:, 2:], objects["labels"].unsqueeze(1)], 1))
    objects = torch.cat(found)  # (objects, 3): width, height and class
    boxes, scores, labels = [], [], []
    for label in range(classes):
        sizes = objects[objects[:, 2] == label, :2]
        if len(sizes):
            grid = _grid(sizes.mean(0), len(sizes) / images)
            boxes.append(grid)
            scores.append(torch.full((len(grid),), len(sizes) / len(objects)))
            labels.append(torch.full((len(grid),), label))
    return {"boxes": torch.cat(boxes), "scores": torch.cat(scores), "labels": torch.cat(labels)}


def _grid(size: Tensor, count: float) -> Tensor:
    """Return boxes of one size whose centres are spread evenly, at least `count` of them."""
    columns = max(1, round((count * float(size[1] / size[0])) ** 0.5))
    rows = max(1, -(-int(count + 0.5) // columns))
    x = (torch.arange(columns) + 0.5) / columns
    y = (torch.arange(rows) + 0.5) / rows
    centres = torch.cartesian_prod(x, y)  # (boxes, 2)
    return torch.cat([centres - size / 2, centres + size / 2], 1).clamp(0, 1)
