"""From images to what a model reads of them: pixels, in training changed at random."""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft.data.images import open_image, without_warnings
from lightning_peft.errors import ConfigError, near_misses, require

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import BaseImageProcessor

BYTES = "_bytes"
"""Column of what an image's file holds, for images without a file of their own."""


def settings_for(processor: "BaseImageProcessor", size: int | None, whole: bool) -> dict[str, Any]:
    """Return what an image processor must do otherwise than it was saved.

    Args:
        processor: Of the model.
        size: Pixels of both edges that the model shall read; None leaves the processor's own.
        whole: Scale the whole image to that size, instead of cutting out its middle.

    Raises:
        ConfigError: The processor names no size.
    """
    own: dict[str, Any] = processor.to_dict()
    scaled, cut = own.get("size") or {}, own.get("crop_size") or {}
    wanted = cut if own.get("do_center_crop") else scaled
    now = wanted.get("height") or wanted.get("shortest_edge")
    if now is None:
        raise ConfigError(
            f"the image processor must name a size in pixels, but {type(processor).__name__} has "
            f"{scaled or 'none'} instead."
        )
    size = size or int(now)
    square = {"height": size, "width": size}
    if whole:
        return {"size": square, "do_center_crop": False}
    edges = {name: round(edge * size / now) for name, edge in scaled.items() if edge is not None}
    return {"size": edges} | ({"crop_size": square} if own.get("do_center_crop") else {})


def augmentations(settings: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Return random changes of images `(batch, 3, height, width)` with values from 0 to 1.

    Args:
        settings: Classes of `kornia.augmentation` for single images, in order, with their
            arguments: `{RandomHorizontalFlip: {p: 0.5}}`.

    Raises:
        ConfigError: There is no such class, or it takes other arguments.
        MissingExtraError: kornia is not installed.
    """
    kornia: Any = require("kornia.augmentation", "images")
    known: dict[str, Any] = {
        name: kind
        for name, kind in inspect.getmembers(kornia, inspect.isclass)
        if issubclass(kind, kornia.AugmentationBase2D) and not name.endswith("Base2D")
    }
    steps: list[nn.Module] = []
    for name, given in settings.items():
        if name not in known:
            raise ConfigError(
                f"`augmentation` must name classes of kornia.augmentation for single images, but "
                f"has {name!r}.{near_misses(name, known)}"
            )
        try:
            steps.append(known[name](**(given or {})))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"`augmentation.{name}` cannot be made: {error}") from error
    return nn.Sequential(*steps)


@dataclasses.dataclass(frozen=True)
class Pixels(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The images of a split, decoded when they are asked for."""

    rows: "Dataset"
    column: str
    """Of the images' paths or names."""
    labels: Sequence[int] | None
    """Number of each image's label; None to predict."""
    processor: Any
    """Of the model."""
    settings: Mapping[str, Any]
    """What the processor must do otherwise than it was saved."""
    augmentation: nn.Module | None = None
    """Random changes of a batch; None for evaluation."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Return the items of a batch, which torch's loader asks for at once."""
        rows = self.rows[list(indices)]
        pairs = zip(rows[self.column], rows[BYTES], strict=True)
        with without_warnings():
            images = [open_image(held or name, name, upright=True) for name, held in pairs]
        batch = self._pixels(images)
        if self.labels is None:
            return [{"pixel_values": pixels} for pixels in batch]
        return [
            {"pixel_values": pixels, "labels": torch.tensor(self.labels[i])}
            for pixels, i in zip(batch, indices, strict=True)
        ]

    def _pixels(self, images: list[Any]) -> Tensor:
        """Return `(batch, 3, height, width)` in float32."""
        settings = dict(self.settings)
        if self.augmentation is None:
            return self._processed(images, settings)
        pixels = self.augmentation(self._processed(images, settings | {"do_normalize": False}))
        mean, std = (
            torch.tensor(getattr(self.processor, name)).view(-1, 1, 1)
            for name in ("image_mean", "image_std")
        )
        return (pixels - mean) / std if self.processor.do_normalize else pixels

    def _processed(self, images: list[Any], settings: Mapping[str, Any]) -> Tensor:
        found: Tensor = self.processor(images=images, return_tensors="pt", **settings)[
            "pixel_values"
        ]
        return found


def stacked(items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return a batch of items of the same size."""
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def unaugmented(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return a loader of the same images as they are, in order."""
    items: Any = loader.dataset
    if isinstance(items, Pixels):
        items = dataclasses.replace(items, augmentation=None)
    return DataLoader(items, batch_size=loader.batch_size, collate_fn=loader.collate_fn)
