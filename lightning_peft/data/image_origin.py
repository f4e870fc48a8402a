"""Where labelled images come from: folders, tables of paths, arrays, the hub or a package."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_peft.data import image_arrays as arrays
from lightning_peft.data.bad_rows import SKIP, BadRows
from lightning_peft.data.images import SUFFIXES
from lightning_peft.data.origin import SPLITS
from lightning_peft.data.packaged import located
from lightning_peft.data.sources import FORMATS, read_file, read_hub
from lightning_peft.errors import ConfigError, DataError, near_misses

if TYPE_CHECKING:
    from datasets import Dataset

_SYSTEM = ("Thumbs.db", "desktop.ini", "__MACOSX")  # what file managers leave, beside hidden files


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageOrigin:
    """The place of labelled images: `path`, else `hub`, else the packaged `source`.

    Raises:
        ConfigError: None of them is given, or a name is unknown.
    """

    path: str | Mapping[str, str] | None = None
    """A folder, a table of paths, a file of arrays or an image; or one of them by split."""
    hub: str | None = None
    """Name of a data set on the hub."""
    hub_config: str | None = None
    """Its configuration, where it has several."""
    source: str | None = None
    """Data that a package carries in a form of its own: `mnist`."""

    def __post_init__(self) -> None:
        if self.path is None and self.hub is None and self.source is None:
            raise ConfigError(
                "`path` must be a folder or a file (or `hub` a data set, or `source` mnist), but "
                "none of them is given."
            )
        if self.source not in (None, "mnist"):
            raise ConfigError(f"`source` must be mnist, but is {self.source!r} instead.")
        for name in self.path if isinstance(self.path, Mapping) else ():
            if name not in SPLITS:
                raise ConfigError(
                    f"`path` must be given by split ({', '.join(SPLITS)}), but has {name!r} "
                    f"instead.{near_misses(name, SPLITS)}"
                )

    def places(self) -> dict[str, Path]:
        """Return the folders and files by split.

        Raises:
            DataError: One does not exist.
        """
        if self.path is None:
            return {}
        if isinstance(self.path, str):
            return _splits_in(_existing(self.path))
        places = {split: _of_split(_existing(path), split) for split, path in self.path.items()}
        return {"predict": places["test"]} | places if "test" in places else places

    def name(self, split: str) -> str:
        """Return what a person calls the place that the rows of a split come from."""
        if self.path is not None:
            return f"`{self.places().get(split, self.path)}`"
        return f"`{self.hub or self.source}` ({split})"

    def folder(self, split: str) -> Path | None:
        """Return the folder that the paths in a table are relative to; None where it is none."""
        place = self.places().get(split)
        is_table = place is not None and place.is_file() and place.suffix.lower() in FORMATS
        return place.parent if place is not None and is_table else None

    def prepare(self) -> None:
        """Download a data set of the hub."""
        if self.path is None and self.hub is not None:
            read_hub(self.hub, self.hub_config)

    def read(self, split: str, bad: BadRows) -> "Dataset | None":
        """Read the rows of a split, images not yet decoded; None where there are none.

        Raises:
            DataError: A place is missing, empty or damaged.
        """
        if self.path is not None:
            place = self.places().get(split)
            return _read(place, split, bad) if place is not None else None
        if self.hub is not None:
            name = "test" if split == "predict" else split
            return read_hub(self.hub, self.hub_config).get(name)
        return arrays.read_mnist() if split in ("train", "predict") else None


def _existing(path: str) -> Path:
    place = Path(located(path)).expanduser()
    if not place.exists():
        near = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
        raise DataError(f"`path` {str(place)!r} does not exist.{near_misses(place.name, near)}")
    return place


def _splits_in(place: Path) -> dict[str, Path]:
    """Return the places of the splits that one place has; it is itself what is to be predicted."""
    if place.is_dir():
        found = arrays.idx_files(place)
        if found:
            return found | {"predict": found.get("test", place)}
        return (_split_folders(place) or {"train": place}) | {"predict": place}
    if place.suffix.lower() == ".npz":
        named = arrays.splits_of_npz(place)
        return dict.fromkeys([*(named or ["train"]), "predict"], place)
    return {"train": place, "predict": place}


def _split_folders(place: Path) -> dict[str, Path]:
    """Return the folders that are named for splits, whatever their case; none without training's.

    A folder of bare images beside others of unknown names is one of a label: there are trains among
    the vehicles.
    """
    folders = {path.name.casefold(): path for path in _folders_in(place)}
    found = {
        split: folders[name]
        for split, names in arrays.NAMES.items()
        for name in names
        if name in folders
    }
    known = {name for names in arrays.NAMES.values() for name in names}
    is_split = "train" in found and (_folders_in(found["train"]) or folders.keys() <= known)
    return found if is_split else {}


def _of_split(place: Path, split: str) -> Path:
    """Return the place itself, or the one inside it that is named for the split."""
    return _splits_in(place).get(split, place) if place.is_dir() else place


def _read(place: Path, split: str, bad: BadRows) -> "Dataset | None":
    labelled, ending = split != "predict", place.suffix.lower()
    if place.is_dir():
        return _read_folder(place, labelled, bad)
    if ending == ".npz":
        return arrays.read_npz(place, split, labelled)
    if arrays.is_idx(place):
        return arrays.read_idx(place, labelled)
    if ending in SUFFIXES and not labelled:
        return _rows([place], None)
    if ending not in FORMATS:
        raise DataError(
            f"`path` must be a folder of images, a table of paths ({', '.join(FORMATS)}), .npz or "
            f"an IDX file for {split}, but is {str(place)!r} instead."
        )
    return read_file(place, bad=bad)


def _read_folder(place: Path, labelled: bool, bad: BadRows) -> "Dataset":
    """Read a folder that has one with images for each label, or, to predict, any."""
    if not labelled:
        return _rows(_images_in(place), None)
    folders = _folders_in(place)
    images = {path: _images_in(path, bad) for path in folders}
    if not any(images.values()):
        raise DataError(
            f"`{place}` must have a folder with images for each label, but has "
            f"{', '.join(path.name for path in folders) or 'no folders'} instead."
        )
    for folder, files in images.items():
        if files and all(file.parent != folder for file in files):
            below = sorted({file.relative_to(folder).parts[0] for file in files})
            raise DataError(
                f"`{place}` must have a folder with images for each label, but `{folder.name}` has "
                f"them in folders of its own ({', '.join(below[:5])}): move them up, or if it "
                f"is a split, write `data.path='{{train: <folder>, test: <folder>}}'`."
            )
    labels = [folder.name for folder, files in images.items() for _ in files]
    return _rows([file for files in images.values() for file in files], labels)


def _images_in(folder: Path, bad: BadRows | None = None) -> list[Path]:
    """Return the images in a folder and those below; what is none is passed over, and said."""
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and all(_is_own(folder / part) for part in path.relative_to(folder).parts)
    ]
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    others = len(files) - len(images)
    if others:
        first = next(path for path in files if path.suffix.lower() not in SUFFIXES)
        rank_zero_info(f"Passed over {others:,} files in `{folder}` that are no images: {first}.")
    if not images:
        reason = f"`{folder}` must hold images ({', '.join(SUFFIXES)}), but has none"
        if bad is None:
            raise DataError(f"{reason}.")
        bad.refuse(f"{reason}: remove the folder, or {SKIP}.")
    return images


def _folders_in(place: Path) -> list[Path]:
    return [path for path in sorted(place.iterdir()) if path.is_dir() and _is_own(path)]


def _is_own(path: Path) -> bool:
    return not path.name.startswith(".") and path.name not in _SYSTEM


def _rows(images: list[Path], labels: list[str] | None) -> "Dataset":
    from datasets import Dataset

    columns = {"image": [str(path) for path in images]}
    return Dataset.from_dict(columns | ({"label": labels} if labels is not None else {}))
