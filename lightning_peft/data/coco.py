"""COCO: one JSON file of images, annotations and categories for each split."""

import json
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from lightning_peft.data.bad_rows import SKIP, BadRows
from lightning_peft.data.json_lines import parsed
from lightning_peft.errors import DataError

_Id = int | str
_FAR = 1e9  # pixels; no number that is none, and no infinite one, is less
_PARTS = ("images", "annotations", "categories")


def read_coco(
    file: Path, folder: Path | None, bad: BadRows, annotated: bool = True
) -> list[dict[str, Any]]:
    """Return the images of a file with their objects; crowds are to be ignored.

    Args:
        file: JSON with `images`, `annotations` and `categories`.
        folder: Of the images; None looks in those around the file.
        bad: What becomes of images with an annotation that cannot be used.
        annotated: Read the annotations too.

    Raises:
        DataError: The file is damaged, or an image or an annotation is not as it must be.
    """
    content = _content(file, _PARTS if annotated else _PARTS[:1])
    images = _by_id(file, content, "images", "file_name")
    place = folder or _folder(file, images)
    rows = {key: {"image": str(place / image["file_name"])} for key, image in images.items()}
    if not annotated:
        return list(rows.values())
    return _annotated(file, content, rows, bad)


def _annotated(
    file: Path, content: Mapping[str, Any], rows: dict[_Id, dict[str, Any]], bad: BadRows
) -> list[dict[str, Any]]:
    labels = {k: c["name"] for k, c in _by_id(file, content, "categories", "name").items()}
    found: dict[_Id, dict[str, Any]] = {
        key: row | {"annotation": str(file), "boxes": [], "labels": [], "ignored": []}
        for key, row in rows.items()
    }
    spoilt: set[Hashable] = set()
    seen: set[Any] = set()
    for number, annotation in enumerate(content["annotations"], 1):
        wrong = _fault(annotation, rows, labels, seen)
        key = annotation.get("image_id") if isinstance(annotation, Mapping) else None
        if wrong:
            bad.refuse(f"annotation {number:,} of `{file}` {wrong}: correct it, or {SKIP}.")
            if isinstance(key, Hashable):  # one of no image spoils none
                spoilt.add(key)
            continue
        if annotation.get("id") is not None:
            seen.add(annotation["id"])
        x, y, width, height = map(float, annotation["bbox"])
        row = found[key]  # type: ignore[index]  # `_fault` looked it up
        row["boxes"].append([x, y, x + width, y + height])
        row["labels"].append(labels[annotation["category_id"]])
        row["ignored"].append(bool(annotation.get("iscrowd", 0)))
    return [row for key, row in found.items() if key not in spoilt]


def _content(file: Path, parts: tuple[str, ...]) -> dict[str, Any]:
    try:
        content = parsed(file.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"`{file}` cannot be read: {error}.") from error
    except json.JSONDecodeError as error:
        raise DataError(f"`{file}` is damaged in line {error.lineno:,}: {error}.") from error
    except ValueError as error:
        raise DataError(f"`{file}` cannot be read: {error}.") from error
    lists = isinstance(content, dict) and all(isinstance(content.get(p), list) for p in parts)
    if not lists:
        found = ", ".join(content) if isinstance(content, dict) else type(content).__name__
        raise DataError(
            f"`{file}` must hold lists of {', '.join(parts)}, as COCO files do, but holds {found}."
        )
    return content


def _by_id(file: Path, content: Mapping[str, Any], part: str, name: str) -> dict[_Id, Any]:
    found: dict[_Id, Any] = {}
    for number, entry in enumerate(content[part], 1):
        whole = isinstance(entry, dict) and isinstance(entry.get("id"), int | str)
        if not whole or not isinstance(entry.get(name), str) or not entry[name]:
            raise DataError(
                f"entry {number:,} of `{part}` in `{file}` must have an `id` and a text "
                f"as `{name}`, but is {str(entry)[:80]}."
            )
        if entry["id"] in found:
            raise DataError(
                f"`{part}` in `{file}` must have an `id` each, but entry {number:,} has "
                f"{entry['id']}, which another has too."
            )
        found[entry["id"]] = entry
    return found


def _fault(
    annotation: Any, images: Mapping[_Id, Any], labels: Mapping[_Id, str], seen: set[Any]
) -> str:
    if not isinstance(annotation, dict):
        return f"must be an object, but is {annotation!r}"
    for name in ("id", "image_id", "category_id"):
        if not isinstance(annotation.get(name), Hashable):
            return f"must have a number or a text as `{name}`, but has {annotation[name]!r}"
    if annotation.get("id") in seen:
        return f"must have an `id` of its own, but has {annotation['id']}, which another has too"
    if annotation.get("image_id") not in images:
        return f"must have the `image_id` of an image, but has {annotation.get('image_id')!r}"
    if annotation.get("category_id") not in labels:
        return (
            f"must have the `category_id` of a category ({', '.join(map(str, labels))}), but has "
            f"{annotation.get('category_id')!r}"
        )
    box = annotation.get("bbox")
    numbers = isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))
    return "" if numbers else f"must have a `bbox` of x, y, width and height, but has {box!r}"


def _is_number(value: Any) -> bool:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return known and abs(value) < _FAR


def _folder(file: Path, images: Mapping[_Id, Any]) -> Path:
    """Return the first folder around the file that holds the first image."""
    near = [file.parent, file.parent.parent]
    split = file.stem.rpartition("_")[2]  # instances_train2017.json, with train2017 beside it
    places = [place / name for place in near for name in ("", "images", split, f"images/{split}")]
    first = next((image["file_name"] for image in images.values()), "")
    return next((place for place in places if (place / first).is_file()), file.parent)
