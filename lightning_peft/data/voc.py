"""Pascal VOC: a folder with an XML file for each image, and lists of names by split."""

import re
from pathlib import Path
from typing import Any

from lightning_peft.data.bad_rows import SKIP, BadRows
from lightning_peft.data.images import SUFFIXES
from lightning_peft.errors import DataError, require

LISTS = Path("ImageSets/Main")
_ANNOTATIONS = ("Annotations", "annotations", "")  # the last where they lie beside the images
_IMAGES = ("JPEGImages", "images", "")
_LISTS = {
    "train": ("train", "trainval"),
    "validation": ("val",),
    "test": ("test",),
    "predict": ("test",),
}
_BY_CLASS = re.compile(r"\s+(-1|0|1)$")  # whether an image has the class, in a list of a class
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def voc_folder(place: Path) -> Path | None:
    """Return the folder of a data set in VOC's layout that `place` or one of its lists is in."""
    root = place.parents[2] if place.is_file() and place.parent.match(str(LISTS)) else place
    return root if (root / _IMAGES[0]).is_dir() or _annotations(root) is not None else None


def has_lists(place: Path) -> bool:
    """Whether lists say which images of a folder belong to which split."""
    return any((place / LISTS).glob("*.txt"))


def read_voc(place: Path, split: str, bad: BadRows) -> list[dict[str, Any]] | None:
    """Return the images of a split with their objects; None where the lists have no such split.

    `xmin`, `ymin`, `xmax` and `ymax` are taken for the edges of the box in pixels. Objects that
    are marked as difficult are to be ignored, as in VOC's own evaluation.

    Args:
        place: The data set's folder, or a list of its names (`ImageSets/Main/train.txt`).
        split: train, validation, test or predict, whose annotations are not read.
        bad: What becomes of images whose annotation cannot be read.

    Raises:
        DataError: A list or an annotation is missing or damaged.
    """
    root = voc_folder(place)
    if root is None:
        raise DataError(
            f"`path` must be a folder with Annotations and JPEGImages, but {place} is none."
        )
    names = _names(root, place, split)
    if names is None:
        return None
    images, annotations = _images(root), _annotations(root) or root / _ANNOTATIONS[0]
    if split == "predict":
        return [{"image": str(_image(images, name))} for name in names]
    files = [(annotations / f"{name}.xml", name) for name in names]
    return [row for file, name in files if (row := _row(file, images, name, bad)) is not None]


def _names(root: Path, place: Path, split: str) -> list[str] | None:
    """Return the names of a split's images; a data set without lists has one split."""
    if place.is_file():
        return _listed(place, root)
    lists = [root / LISTS / f"{name}.txt" for name in _LISTS[split]]
    for file in lists:
        if file.is_file():
            return _listed(file, root)
    if split == "predict":
        return [path.stem for path in _files(_images(root), SUFFIXES)]
    if has_lists(root):
        return None
    return [path.stem for path in _files(_annotations(root), (".xml",))]


def _listed(file: Path, root: Path) -> list[str]:
    """Return the names in a list, of which VOC's lists by class add 1 or -1.

    What ends so, but is the name of an image, is a name with a space in it.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"`{file}` must be a list of names, but cannot be read: {error}.") from None
    known = {path.stem for path in _files(_images(root), SUFFIXES)}
    whole = [line.strip() for line in lines if line.strip()]
    names = [line if line in known else _BY_CLASS.sub("", line) for line in whole]
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise DataError(f"`{file}` must name each image once, but names {name!r} twice.")
        seen.add(name)
    return names


def _annotations(root: Path) -> Path | None:
    """Return the folder of the XML files; None where there are none."""
    folders = (root / name for name in _ANNOTATIONS)
    return next(
        (folder for folder in folders if folder.is_dir() and any(folder.glob("*.xml"))), None
    )


def _images(root: Path) -> Path:
    return next(root / name for name in _IMAGES if (root / name).is_dir())


def _files(folder: Path | None, suffixes: tuple[str, ...]) -> list[Path]:
    found = folder.iterdir() if folder is not None else ()
    return sorted(path for path in found if path.suffix.lower() in suffixes)


def _image(folder: Path, name: str, filename: str = "") -> Path:
    """Return the image of a name: of any format, or as the annotation calls it."""
    endings = [case for suffix in SUFFIXES for case in (suffix, suffix.upper())]
    candidates = [folder / f"{name}{ending}" for ending in endings]
    told = [folder / Path(filename).name] if filename else []
    return next((path for path in [*candidates, *told] if path.is_file()), candidates[0])


def _row(file: Path, images: Path, name: str, bad: BadRows) -> dict[str, Any] | None:
    try:
        tree = _parsed(file)
        objects = [_object(file, i, found) for i, found in enumerate(tree.findall("{*}object"), 1)]
    except DataError as error:
        bad.refuse(str(error))
        return None
    return {
        "image": str(_image(images, name, tree.findtext("{*}filename") or "")),
        "annotation": str(file),
        "boxes": [box for box, _, _ in objects],
        "labels": [label for _, label, _ in objects],
        "ignored": [difficult for _, _, difficult in objects],
    }


def _parsed(file: Path) -> Any:
    """Parse XML that may come from a stranger: entities and references to files are refused."""
    safe = require("defusedxml.ElementTree", "detection")
    common = require("defusedxml.common", "detection")
    try:
        return safe.parse(file, forbid_dtd=True).getroot()
    except common.DefusedXmlException as error:
        raise DataError(f"`{file}` must be XML without a DTD, but is not: {SKIP}.") from error
    except (safe.ParseError, ValueError, LookupError) as error:
        raise DataError(f"`{file}` is damaged: {error}; or {SKIP}.") from error
    except OSError as error:
        raise DataError(
            f"`{file}` must hold the objects of an image, but cannot be read: "
            f"{error.strerror or error}; or {SKIP}."
        ) from error


def _object(file: Path, number: int, found: Any) -> tuple[list[float], str, bool]:
    """Return the box, the class and whether it is difficult; names may stand in a namespace."""
    label = (found.findtext("{*}name") or "").strip()
    texts = [found.findtext(f"{{*}}bndbox/{{*}}{corner}") for corner in _CORNERS]
    if not label or None in texts:
        raise DataError(
            f"object {number} of `{file}` must have a name and a bndbox of {', '.join(_CORNERS)}, "
            f"but has {label!r} and {texts}: correct it, or {SKIP}."
        )
    try:
        box = [float(text) for text in texts]
    except ValueError:
        raise DataError(
            f"object {number} ({label}) of `{file}` must have numbers as corners, but has {texts}: "
            f"correct it, or {SKIP}."
        ) from None
    return box, label, (found.findtext("{*}difficult") or "0").strip() == "1"
