"""Images with a label each, from folders, tables, arrays, the hub or a package."""

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from lightning_peft.data.bad_rows import SKIP
from lightning_peft.data.choices import Choice, Loading
from lightning_peft.data.image_origin import ImageOrigin
from lightning_peft.data.images import open_image, without_warnings
from lightning_peft.data.labels import bad_labels, encode, infer_labels
from lightning_peft.data.pixels import BYTES, Pixels, augmentations, settings_for, stacked
from lightning_peft.data.rows import RowData
from lightning_peft.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import BaseImageProcessor


class ImageData(RowData):
    """Images with one label each.

    Batches are dictionaries of tensors: `pixel_values` of shape `(batch, 3, height, width)`, scaled
    and normalised as the model's image processor says, and `labels` of shape `(batch,)`. Images are
    turned as their EXIF orientation says, become RGB, and are decoded when they are asked for; a
    first pass over all of them finds those that are damaged. Training images whose file a held-out
    split has too are left out, and counted in `dropped`.

    Example:
        >>> data = ImageData(path="photos", size=112)  # photos/cat/1.png, photos/dog/2.jpg, ...
        >>> data.connect(source.image_processor()).setup("fit")
        >>> data.labels
        ('cat', 'dog')

    Args:
        path: A folder with one for each label, or with train, validation and test above these; a
            CSV, TSV, JSON lines or Parquet file with a column of paths; a `.npz` file of arrays;
            MNIST's IDX files, or their folder; or one of these by split. For `predict` also a
            folder of any images, or a single one.
        hub: Name of a data set on the hub, with a column of images.
        hub_config: Its configuration, where it has several.
        source: Data that a package carries: `mnist` (5,000 images).
        image: Column of the images, paths relative to the table's folder.
        label: Column of the labels; not read for `predict`.
        labels: The labels in the order of the model's outputs; None takes those of the training
            rows in ascending order, numbers by value.
        size: Pixels of both edges that the model reads; None takes its image processor's.
        whole: Scale the whole image to that size, which may change its proportions, instead of
            cutting out its middle.
        augmentation: Random changes of training images: classes of `kornia.augmentation` with
            their arguments, in order.
        validation: Share of the training images to hold out where there is no validation split.
        test: Share of them to hold out where there is no test split; None draws none.
        seed: Seed of these draws, of `limit` and `shots`.
        batch_size: Images in a batch.
        limit: At most so many images of each split, drawn by seed; for trials.
        shots: At most so many training images of each label, drawn by seed.
        skip_bad_rows: Leave images out that cannot be used, and count them.
        num_workers: Processes that load batches.
    """

    def __init__(
        self,
        *,
        path: str | Mapping[str, str] | None = None,
        hub: str | None = None,
        hub_config: str | None = None,
        source: str | None = None,
        image: str = "image",
        label: str = "label",
        labels: Sequence[str | int] | None = None,
        size: int | None = None,
        whole: bool = False,
        augmentation: Mapping[str, Mapping[str, Any]] | None = None,
        validation: float = 0.1,
        test: float | None = None,
        seed: int = 0,
        batch_size: int = 32,
        limit: int | None = None,
        shots: int | None = None,
        skip_bad_rows: bool = False,
        num_workers: int = 0,
    ) -> None:
        place = ImageOrigin(path=path, hub=hub, hub_config=hub_config, source=source)
        super().__init__(
            place,
            Choice(
                validation=validation, test=test, seed=seed, limit=limit, shots=shots,
                skip_bad_rows=skip_bad_rows,
            ),
            Loading(batch_size=batch_size, num_workers=num_workers),
        )  # fmt: skip
        if size is not None and size < 1:
            raise ConfigError(f"`size` must be at least 1 pixel, but is {size} instead.")
        self.place, self.image, self.label = place, image, label
        self.size, self.whole = size, whole
        self._augmentation = augmentations(augmentation) if augmentation else None
        self._labels = tuple(str(name) for name in labels) if labels is not None else None
        self._processor: BaseImageProcessor | None = None
        self._settings: dict[str, Any] = {}

    def connect(self, processor: "BaseImageProcessor", labels: Sequence[str] | None = None) -> Self:
        """Take the model's image processor and, for a model that is already trained, its labels.

        Raises:
            ConfigError: The processor names no size.
        """
        self._settings = settings_for(processor, self.size, self.whole)
        self._processor = processor
        self._labels = tuple(labels) if labels is not None else self._labels
        self._items.clear()
        return self

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels in the order of the model's outputs; reads the training rows if need be."""
        if self._labels is None:
            table, origin = self.table("train"), self.origin.name("train")
            self._labels = infer_labels(table, self.label, origin)
        return self._labels

    def label_counts(self, split: str) -> dict[str, int]:
        """Return how many images of a split have each of the labels."""
        counts = Counter(self.strata(split, self.chosen(split)))
        return {name: counts[number] for number, name in enumerate(self.labels)}

    def rows(self, split: str) -> list[dict[str, Any]]:
        """Return the rows of a split without pixels, in the order of its unshuffled loader."""
        rows: list[dict[str, Any]] = self.chosen(split).remove_columns(BYTES).to_list()
        return rows

    def columns(self, split: str, rows: "Dataset") -> dict[str, str | None]:
        return {"image": self.image, "label": None if split == "predict" else self.label}

    def problems(self, split: str, rows: "Dataset", number: Callable[[int], int]) -> dict[int, str]:
        origin, names = self.origin.name(split), self._names(split, rows)
        found = self._unreadable(rows, names, origin, number)
        if split != "predict":
            # The training rows themselves say what labels there are, unless a setting does.
            known = self._labels if split == "train" else self.labels
            wrong = bad_labels(rows, self.label, known, origin, number)
            found = {i: f"{why} It is `{names[i]}`." for i, why in wrong.items()} | found
        return dict(sorted(found.items()))

    def formed(self, split: str, rows: "Dataset") -> "Dataset":
        """Return rows with the path or name of each image, and what its file holds if it has none.

        Paths are relative to the folder of their table no more.
        """
        held = [_held(value) for value in _stored(rows, self.image)]
        names = self._names(split, rows)
        # Added before the other goes, since a table without a column has no rows.
        rows = rows.add_column(BYTES, held).remove_columns(self.image)
        return rows.add_column(self.image, names)

    def keys(self, rows: "Dataset") -> list[Hashable]:
        pairs = zip(rows[self.image][:], rows[BYTES][:], strict=True)
        return [_digest(held or Path(name).read_bytes()) for name, held in pairs]

    def strata(self, split: str, rows: "Dataset") -> list[int]:
        return encode(rows, self.label, self.labels, self.origin.name(split))

    def items(self, split: str, rows: "Dataset") -> Pixels:
        if self._processor is None:
            raise ConfigError("`connect(processor)` must be called before batches can be made.")
        return Pixels(
            rows,
            self.image,
            None if split == "predict" else self.strata(split, rows),
            self._processor,
            self._settings,
            self._augmentation if split == "train" else None,
        )

    def collator(self) -> Callable[[Any], Any]:
        return stacked

    def inputs(self, split: str) -> list[str]:
        return list(self.chosen(split)[self.image][:])

    def targets(self, split: str) -> list[str]:
        return [self.labels[number] for number in self.strata(split, self.chosen(split))]

    def _names(self, split: str, rows: "Dataset") -> list[str | None]:
        """Return the path of each image, or a name that tells its number; None for none."""
        folder = self.place.folder(split)
        names: list[str | None] = []
        for number, value in enumerate(_stored(rows, self.image), 1):
            if isinstance(value, str) and value.strip():
                names.append(value if folder is None else str(folder / value))
            else:
                names.append(_named(value) or (f"#{number}" if _held(value) else None))
        return names

    def _unreadable(
        self,
        rows: "Dataset",
        names: Sequence[str | None],
        origin: str,
        number: Callable[[int], int],
    ) -> dict[int, str]:
        """Return what is wrong with each image that cannot be read, by its index."""

        def fault(index: int, name: str | None, held: bytes | None) -> str | None:
            place = f"row {number(index):,} of {origin}"
            if name is None:
                return f"`{self.image}` must be an image in {place}, but is missing: {SKIP}."
            try:
                open_image(held or name, f"`{name}`", upright=True)
            except DataError as error:
                return f"{error} ({place}): repair or remove it, or {SKIP}."
            return None

        held = [_held(value) for value in _stored(rows, self.image)]
        with without_warnings(), ThreadPoolExecutor() as pool:  # PIL decodes outside Python's lock
            faults = pool.map(fault, range(len(rows)), names, held)
            return {i: reason for i, reason in enumerate(faults) if reason is not None}


def _stored(rows: "Dataset", column: str) -> list[Any]:
    """Return a column of images without decoding them: paths, bytes, or both."""
    from datasets import Image

    if isinstance(rows.features[column], Image):
        rows = rows.cast_column(column, Image(decode=False))
    values: list[Any] = rows[column][:]
    return values


def _held(value: Any) -> bytes | None:
    found = value.get("bytes") if isinstance(value, Mapping) else value
    return found if isinstance(found, bytes) else None


def _named(value: Any) -> str | None:
    return value.get("path") if isinstance(value, Mapping) else None


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
