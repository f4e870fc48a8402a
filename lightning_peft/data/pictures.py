"""Where images with boxes come from: Pascal VOC, COCO, or images alone."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_peft.data.bad_rows import BadRows
from lightning_peft.data.coco import read_coco
from lightning_peft.data.images import SUFFIXES
from lightning_peft.data.origin import SPLITS
from lightning_peft.data.voc import has_lists, read_voc, voc_folder
from lightning_peft.errors import ConfigError, DataError, near_misses

if TYPE_CHECKING:
    from datasets import Dataset


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureOrigin:
    """The place of images with boxes.

    Raises:
        ConfigError: A split has an unknown name.
    """

    path: str | Mapping[str, str]
    """A VOC folder, whose lists tell the splits, or a COCO file; or one of them, or a VOC list, by
    split; for `predict` also a folder of images or a single one."""
    images: str | None = None
    """Folder of a COCO file's images; None looks in the folders around it."""

    def __post_init__(self) -> None:
        for name in () if isinstance(self.path, str) else self.path:
            if name not in SPLITS:
                raise ConfigError(
                    f"`path` must be given by split ({', '.join(SPLITS)}), but has {name!r} "
                    f"instead.{near_misses(name, SPLITS)}"
                )

    def files(self) -> dict[str, str]:
        """Return the places by split."""
        if not isinstance(self.path, str):
            places = dict(self.path)
            return {"predict": places["test"]} | places if "test" in places else places
        if has_lists(Path(self.path).expanduser()):
            return dict.fromkeys(SPLITS, self.path)
        return {"train": self.path, "predict": self.path}

    def name(self, split: str) -> str:
        """Return what a person calls the place of a split."""
        return f"`{self.files().get(split, self.path)}`"

    def prepare(self) -> None:
        """Do nothing: all is there."""

    def read(self, split: str, bad: BadRows) -> "Dataset | None":
        """Read the images of a split, with their objects unless it is `predict`.

        Raises:
            DataError: The place is missing or damaged, or an image is, unless `bad` leaves it out.
        """
        from datasets import Dataset

        if split not in self.files():
            return None
        place = Path(self.files()[split]).expanduser()
        rows = self._rows(place, split, bad)
        if rows is None:
            return None
        if not rows:
            reason = f": {bad.reasons[0]}" if bad.reasons else "."
            raise DataError(f"`{place}` must hold at least one image, but has none{reason}")
        return Dataset.from_list(rows)

    def _rows(self, place: Path, split: str, bad: BadRows) -> list[dict[str, Any]] | None:
        if not place.exists():
            near = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
            raise DataError(f"`path` {str(place)!r} does not exist.{near_misses(place.name, near)}")
        if voc_folder(place) is not None:
            return read_voc(place, split, bad)
        if place.suffix.lower() == ".json":
            folder = Path(self.images).expanduser() if self.images is not None else None
            return read_coco(place, folder, bad, annotated=split != "predict")
        if split == "predict":
            return [{"image": str(path)} for path in _images(place)]
        raise DataError(
            f"`path` must be a VOC folder (with Annotations and JPEGImages), one of its lists or a "
            f"COCO file (.json) for {split}, but is {str(place)!r} instead."
        )


def _images(place: Path) -> list[Path]:
    found = [place] if place.is_file() else sorted(place.rglob("*"))
    return [path for path in found if path.suffix.lower() in SUFFIXES]
