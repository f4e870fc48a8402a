"""Images with the boxes and classes of the objects in them, as batches of pixels."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from lightning_peft.data.bad_rows import SKIP
from lightning_peft.data.choices import Choice, Loading
from lightning_peft.data.images import open_image, without_warnings
from lightning_peft.data.pictures import PictureOrigin
from lightning_peft.data.rows import RowData
from lightning_peft.errors import ConfigError, DataError, near_misses

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import BaseImageProcessor

_SLACK = 1.0  # pixels by which annotators reach over the edge of an image; such boxes are cut


class DetectionData(RowData):
    """Images with the box and class of each object, from Pascal VOC or COCO files.

    Boxes are left, top, right and bottom in pixels of the file. Images without an object are rows
    like any other. Objects that are to be ignored (COCO's crowds, VOC's difficult ones) are neither
    trained on nor counted.

    Batches are dictionaries: `pixel_values` `(batch, 3, height, width)`, padded with zeros at the
    right and the bottom; `pixel_mask` `(batch, height, width)`, 1 at what is no padding; `labels`,
    for each image `class_labels` `(objects,)` and `boxes` `(objects, 4)`, centre, width and height
    as shares of the image; `row_sizes` `(batch, 2)`, width and height of the files in pixels;
    `row_shares` `(batch, 2)`, which share of the padded width and height is the image's;
    `row_objects`, for each image all its `boxes` in pixels, their `labels`, and whether they are
    `ignored`; and `row_view`, a text that is the same for the same pixels.

    Args:
        path: A VOC folder, whose lists tell the splits, or a COCO file; or places by split: train,
            validation, test, predict. For `predict` also a folder of images or a single one.
        images: Folder of a COCO file's images; None looks in the folders around it.
        classes: The classes in the order of the model's outputs; None takes those of the training
            images in ascending order.
        size: What images are scaled to in pixels: `height` and `width`, or `shortest_edge` and
            `longest_edge`; None takes the model's own.
        flip: Probability with which a training image is mirrored, its boxes too.
        keep: Keep the scaled images in memory, so that each is read once; for small sets.
        validation: Share of the training images to hold out where there is no validation split.
        seed: Seed of that draw and of `limit`.
        batch_size: Images in a batch.
        limit: At most so many images of each split, drawn by seed; for trials.
        skip_bad_rows: Leave images out that cannot be used, and count them.
        num_workers: Processes that load batches.
    """

    def __init__(
        self,
        *,
        path: str | Mapping[str, str],
        images: str | None = None,
        classes: Sequence[str] | None = None,
        size: Mapping[str, int] | None = None,
        flip: float = 0.0,
        keep: bool = False,
        validation: float = 0.1,
        seed: int = 0,
        batch_size: int = 8,
        limit: int | None = None,
        skip_bad_rows: bool = False,
        num_workers: int = 0,
    ) -> None:
        if not 0 <= flip <= 1:
            raise ConfigError(f"`flip` must be a probability, but is {flip} instead.")
        super().__init__(
            PictureOrigin(path=path, images=images),
            Choice(validation=validation, seed=seed, limit=limit, skip_bad_rows=skip_bad_rows),
            Loading(batch_size=batch_size, num_workers=num_workers),
        )
        self.size = dict(size) if size is not None else None
        self.flip, self.keep = flip, keep
        self._classes = tuple(classes) if classes is not None else None
        self._processor: BaseImageProcessor | None = None
        self._sizes: dict[str, tuple[int, int]] = {}  # width and height of the files

    def connect(self, processor: "BaseImageProcessor", labels: Sequence[str] | None = None) -> Self:
        """Take the model's image processor and, for a model that is trained, its classes."""
        self._processor = processor
        if labels is not None:
            self._classes = tuple(labels)
        self._items.clear()
        return self

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes in the order of the model's outputs; reads the training rows if need be."""
        if self._classes is None:
            found = {label for labels in self.table("train")["labels"] for label in labels}
            if not found:
                raise DataError(
                    f"{self.origin.name('train')} must have at least one object, but has none."
                )
            self._classes = tuple(sorted(found))
        return self._classes

    def columns(self, split: str, rows: "Dataset") -> dict[str, str | None]:
        return {}

    def problems(self, split: str, rows: "Dataset", number: Callable[[int], int]) -> dict[int, str]:
        # The training images themselves say what classes there are, unless a setting does.
        classes = None if split == "predict" else self._classes
        if split in ("validation", "test"):
            classes = self.labels
        with without_warnings():
            problems = [(i, self._problem(row, classes)) for i, row in enumerate(rows)]
        found = {i: f"{problem}: correct it, or {SKIP}." for i, problem in problems if problem}
        return found | _repeated(rows, found)

    def formed(self, split: str, rows: "Dataset") -> "Dataset":
        from datasets import Dataset

        sizes = [self._sizes[image] for image in rows["image"]]
        columns: dict[str, Any] = dict(
            zip(("width", "height"), zip(*sizes, strict=True), strict=True)
        )
        if split != "predict":
            cut = map(_cut, rows["boxes"], sizes)
            columns["boxes"] = list(cut)
        return Dataset.from_dict({name: list(rows[name]) for name in rows.column_names} | columns)

    def keys(self, rows: "Dataset") -> list[Hashable]:
        files = map(Path, rows["image"])
        return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]

    def strata(self, split: str, rows: "Dataset") -> list[int]:
        return [0] * len(rows)

    def items(self, split: str, rows: "Dataset") -> "Pictures":
        numbers = {} if split == "predict" else {label: i for i, label in enumerate(self.labels)}
        flip = self.flip if split == "train" else 0.0
        return Pictures(rows.to_list(), self._tool(), self.size, numbers, flip, self.keep)

    def collator(self) -> "PictureCollator":
        return PictureCollator()

    def inputs(self, split: str) -> list[str]:
        return list(self.chosen(split)["image"])

    def targets(self, split: str) -> list[list[dict[str, Any]]]:
        return [
            [
                {"label": label, "box": box, "ignored": ignored}
                for label, box, ignored in zip(
                    row["labels"], row["boxes"], row["ignored"], strict=True
                )
            ]
            for row in self.rows(split)
        ]

    def _tool(self) -> "BaseImageProcessor":
        if self._processor is None:
            raise ConfigError("`connect(processor)` must be called before batches can be made.")
        return self._processor

    def _problem(self, row: Mapping[str, Any], classes: Sequence[str] | None) -> str:
        """Return what is wrong with an image or with one of its objects; empty for nothing."""
        try:
            size = open_image(row["image"]).size
        except DataError as error:
            return str(error).removesuffix(".")
        self._sizes[row["image"]] = size
        for number, box in enumerate(row.get("boxes", ()), 1):
            label = row["labels"][number - 1]
            wrong = _bad_box(box, *size)
            if not wrong and classes is not None and label not in classes:
                wrong = f"must be one of {', '.join(classes)}.{near_misses(label, classes)}"
            if wrong:
                place = f"`{row['annotation']}` (image `{Path(row['image']).name}`)"
                return f"object {number} ({label}) of {place} {wrong.removesuffix('.')}"
        return ""


def _bad_box(box: Sequence[float], width: int, height: int) -> str:
    left, top, right, bottom = box
    if not all(map(math.isfinite, box)):
        return f"must have finite corners, but has {box}"
    if right <= left or bottom <= top:
        return f"must have its left and top before its right and bottom, but has {box}"
    if min(left, top) < -_SLACK or right > width + _SLACK or bottom > height + _SLACK:
        return f"must lie in the image of {width} × {height} pixels, but has {box}"
    return ""


def _repeated(rows: "Dataset", found: Mapping[int, str]) -> dict[int, str]:
    seen: set[str] = set()
    twice = {}
    for i, image in enumerate(rows["image"]):
        if image in seen and i not in found:
            twice[i] = f"each image must stand in its split once, but `{image}` does twice: {SKIP}."
        seen.add(image)
    return twice


def _cut(boxes: Sequence[Sequence[float]], size: tuple[int, int]) -> list[list[float]]:
    """Return boxes without what reaches over the edges of the image."""
    return [
        [min(max(x, 0.0), most) for x, most in zip(box, size * 2, strict=True)] for box in boxes
    ]


@dataclasses.dataclass
class Pictures(torch.utils.data.Dataset[dict[str, Any]]):
    """The images of a split, read and scaled when they are asked for."""

    rows: list[dict[str, Any]]
    processor: "BaseImageProcessor"
    size: dict[str, int] | None
    numbers: Mapping[str, int]  # of the classes
    flip: float
    keep: bool
    _kept: dict[int, tuple[Tensor, tuple[int, int]]] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        pixels, size = self._kept.get(index) or self._read(index)
        # Drawn only where it matters, so that a set without it leaves the random state alone.
        mirrored = self.flip > 0 and bool(torch.rand(()) < self.flip)
        item = {
            "pixels": pixels.flip(-1) if mirrored else pixels,
            "size": size,
            "view": f"{row['image']}{'|mirrored' if mirrored else ''}",
        }
        return item | (self._objects(row, size, mirrored) if self.numbers else {})

    def _read(self, index: int) -> tuple[Tensor, tuple[int, int]]:
        with without_warnings():
            image = open_image(self.rows[index]["image"])
        settings: dict[str, Any] = {"size": self.size} if self.size is not None else {}
        # The collator pads, since how far depends on the batch.
        made = self.processor(images=image, return_tensors="pt", do_pad=False, **settings)
        found = made["pixel_values"][0], image.size
        if self.keep:
            self._kept[index] = found
        return found

    def _objects(
        self, row: Mapping[str, Any], size: tuple[int, int], mirrored: bool
    ) -> dict[str, Tensor]:
        boxes = torch.tensor(row["boxes"], dtype=torch.float32).reshape(-1, 4)
        if mirrored:
            boxes[:, [0, 2]] = size[0] - boxes[:, [2, 0]]
        return {
            "boxes": boxes,
            "classes": torch.tensor([self.numbers[label] for label in row["labels"]]).long(),
            "ignored": torch.tensor(row["ignored"], dtype=torch.bool),
        }


@dataclasses.dataclass(frozen=True)
class PictureCollator:
    """Makes a batch of images, padded to the largest."""

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        shapes = [item["pixels"].shape for item in items]
        height, width = (max(shape[i] for shape in shapes) for i in (1, 2))
        pixels = items[0]["pixels"].new_zeros(len(items), shapes[0][0], height, width)
        mask = torch.zeros(len(items), height, width, dtype=torch.long)
        for i, (item, (_, h, w)) in enumerate(zip(items, shapes, strict=True)):
            pixels[i, :, :h, :w] = item["pixels"]
            mask[i, :h, :w] = 1
        batch = {
            "pixel_values": pixels,
            "pixel_mask": mask,
            "row_sizes": torch.tensor([item["size"] for item in items]),
            "row_shares": torch.tensor([[w / width, h / height] for _, h, w in shapes]),
            "row_view": [item["view"] for item in items],
        }
        return batch | (_annotations(items) if "boxes" in items[0] else {})


def _annotations(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    objects = [
        {"boxes": item["boxes"], "labels": item["classes"], "ignored": item["ignored"]}
        for item in items
    ]
    labels = []
    for item in items:
        trained = ~item["ignored"]
        corners = item["boxes"][trained] / torch.tensor(item["size"]).repeat(2)
        labels.append({"class_labels": item["classes"][trained], "boxes": centred(corners)})
    return {"labels": labels, "row_objects": objects}


def centred(corners: Tensor) -> Tensor:
    """Return boxes `(objects, 4)` of left, top, right, bottom as centre, width and height."""
    low, high = corners[:, :2], corners[:, 2:]
    return torch.cat([(low + high) / 2, high - low], 1)
