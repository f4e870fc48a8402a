"""Pascal VOC: a folder with an XML file for each image, and lists of names by split."""

from pathlib import Path
from typing import Any

from lightning_peft.data.bad_rows import SKIP, BadRows
from lightning_peft.data.images import SUFFIXES
from lightning_peft.errors import DataError, require

ANNOTATIONS, IMAGES, LISTS = "Annotations", "JPEGImages", Path("ImageSets/Main")
_LISTS = {
    "train": ("train", "trainval"),
    "validation": ("val",),
    "test": ("test",),
    "predict": ("test",),
}
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def voc_folder(place: Path) -> Path | None:
    """Return the folder of a data set in VOC's layout that `place` or one of its lists is in."""
    root = place.parents[2] if place.is_file() and place.parent.match(str(LISTS)) else place
    return root if (root / ANNOTATIONS).is_dir() or (root / IMAGES).is_dir() else None


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
            f"`path` must be a folder with {ANNOTATIONS} and {IMAGES}, but {place} is none."
        )
    names = _names(root, place, split)
    if names is None:
        return None
    if split == "predict":
        return [{"image": str(_image(root, name))} for name in names]
    return [row for name in names if (row := _row(root, name, bad)) is not None]


def _names(root: Path, place: Path, split: str) -> list[str] | None:
    """Return the names of a split's images; a data set without lists has one split."""
    if place.is_file():
        return _listed(place)
    lists = [root / LISTS / f"{name}.txt" for name in _LISTS[split]]
    for file in lists:
        if file.is_file():
            return _listed(file)
    if split == "predict":
        return [path.stem for path in _files(root / IMAGES, SUFFIXES)]
    if has_lists(root):
        return None
    return [path.stem for path in _files(root / ANNOTATIONS, (".xml",))]


def _listed(file: Path) -> list[str]:
    """Return the names in a list, of which VOC's lists by class add 1 or -1."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"`{file}` must be a list of names, but cannot be read: {error}.") from None
    names = [line.split()[0] for line in lines if line.strip()]
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise DataError(f"`{file}` must name each image once, but names {name!r} twice.")
        seen.add(name)
    return names


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if path.suffix.lower() in suffixes)


def _image(root: Path, name: str, filename: str = "") -> Path:
    """Return the image of a name: of any format, or as the annotation calls it."""
    told = root / IMAGES / Path(filename).name
    candidates = [(root / IMAGES / name).with_name(f"{name}{suffix}") for suffix in SUFFIXES]
    return next((p for p in [*candidates, told] if p.is_file()), candidates[0])


def _row(root: Path, name: str, bad: BadRows) -> dict[str, Any] | None:
    file = root / ANNOTATIONS / f"{name}.xml"
    try:
        tree = _parsed(file)
        objects = [_object(file, i, found) for i, found in enumerate(tree.findall("object"), 1)]
    except DataError as error:
        bad.refuse(str(error))
        return None
    return {
        "image": str(_image(root, name, tree.findtext("filename") or "")),
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
    label = (found.findtext("name") or "").strip()
    texts = [found.findtext(f"bndbox/{corner}") for corner in _CORNERS]
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
    return box, label, (found.findtext("difficult") or "0").strip() == "1"
