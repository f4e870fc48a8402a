"""Rows as JSON objects, one a line."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lightning_peft.data.bad_rows import BadRows, is_utf8


def columns_of_objects(
    path: Path, lines: Iterable[str], bad: BadRows, first: int = 1
) -> dict[str, list[Any]]:
    """Return the columns of the objects in some lines; what an object lacks is None.

    Args:
        path: Name of their file, for errors.
        lines: With an object each; empty ones are passed over.
        bad: What becomes of rows that cannot be read.
        first: The number of the first line in the file.

    Raises:
        DataError: A line is damaged or no object, or its values have other types than in most.
    """
    rows: dict[int, dict[str, Any]] = {}
    filled = ((number, line) for number, line in enumerate(lines, first) if line.strip())
    for row, (number, line) in enumerate(filled, 1):
        if not is_utf8(line, path, bad, row):
            continue
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            bad.refuse(f"`{path}` is damaged in line {number:,}: {error}.", row)
            continue
        if isinstance(found, dict):
            rows[row] = found
        else:
            bad.refuse(
                f"`{path}` must hold one JSON object in each line, but has "
                f"{type(found).__name__} in line {number:,}.",
                row,
            )
    names = dict.fromkeys(name for found in rows.values() for name in found)
    for name in names:
        for row, reason in _other_types(path, name, rows).items():
            bad.refuse(reason, row)
            del rows[row]
    return {name: [found.get(name) for found in rows.values()] for name in names}


def _other_types(path: Path, name: str, rows: dict[int, dict[str, Any]]) -> dict[int, str]:
    """Return what is wrong with the rows whose values in a column are not of the common types."""
    kinds = {row: set(_kinds(name, found.get(name))) for row, found in rows.items()}
    counts = Counter(pair for found in kinds.values() for pair in found)
    common: dict[str, str] = {}
    for (place, kind), _ in counts.most_common():
        common.setdefault(place, kind)
    odd = {
        row: min(pair for pair in found if common[pair[0]] != pair[1])
        for row, found in kinds.items()
        if any(common[place] != kind for place, kind in found)
    }
    return {
        row: f"`{path}` must hold values of one type a column, but `{place}` is {kind} in row "
        f"{row:,} and {common[place]} in most others."
        for row, (place, kind) in odd.items()
    }


def _kinds(place: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield the types of a value and of all that it holds, each with the place where it stands."""
    kind = _kind(value)
    if kind:
        yield place, kind
    if isinstance(value, list):
        for item in value:
            yield from _kinds(f"{place}[]", item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _kinds(f"{place}.{key}", item)


def _kind(value: Any) -> str:
    """Return what a person calls the type of a value of JSON; empty for none."""
    if isinstance(value, bool):
        return "true or false"
    kinds = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), "")
