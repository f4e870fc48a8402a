"""Boxes drawn on an image, for a person to look at."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_peft.data.images import open_image, without_warnings
from lightning_peft.errors import require

_COLOURS = ("#e6194b", "#0082c8", "#3cb44b", "#f58231", "#911eb4", "#008080", "#f032e6", "#aa6e28")


def draw_objects(
    image: str | Path,
    objects: Sequence[Mapping[str, Any]],
    classes: Sequence[str],
    path: Path,
) -> None:
    """Write a copy of an image with its objects drawn.

    Args:
        image: The file.
        objects: `label`, `score` and `box` (left, top, right, bottom in pixels) of each.
        classes: All of them; each has a colour.
        path: Where the copy goes; the format follows from its ending.
    """
    with without_warnings():
        picture = open_image(image)
    pen = require("PIL.ImageDraw", "detection").Draw(picture)
    width = max(1, round(min(picture.size) / 240))
    for one in reversed(objects):  # the surest last, on top
        colour = _COLOURS[classes.index(one["label"]) % len(_COLOURS)]
        left, top, *_ = one["box"]
        pen.rectangle(one["box"], outline=colour, width=width)
        caption = f"{one['label']} {one['score']:.2f}"
        pen.rectangle(pen.textbbox((left + width, top + width), caption), fill=colour)
        pen.text((left + width, top + width), caption, fill="white")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
