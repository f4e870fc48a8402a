"""Rows as JSON objects, one a line or all in one list."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from lightning_peft.data.bad_rows import BadRows, is_unicode, is_utf8
from lightning_peft.errors import DataError

_DEEPEST = 50
_TOO_DEEP = f"lists and objects must stand in each other at most {_DEEPEST} deep, but do deeper"
_MORE = "Extra data"  # how `json` says that a text goes on behind its first value
_LONG, _BROKEN = "a number of more than 64 bits", "a text that is not UTF-8"
_BROKEN_KEY = "an object with a key that is not UTF-8"
_USABLE = {_LONG: "a number", _BROKEN: "a text", _BROKEN_KEY: "an object"}
"""What should stand where something of the same type does that cannot be stored."""


def parsed(text: str) -> Any:
    """Return what a text of JSON says.

    Raises:
        json.JSONDecodeError: It is no JSON.
        ValueError: It is nested too deeply, or a number has thousands of digits.
    """
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if text.count("[") + text.count("{") > _DEEPEST and _is_deep(found):
        raise ValueError(_TOO_DEEP)
    return found


def columns_of_json(path: Path, file: TextIO, bad: BadRows) -> dict[str, list[Any]]:
    """Return the columns of a file of objects, one a line or all of them in one list.

    Args:
        path: Its name, for errors.
        file: Open for reading.
        bad: What becomes of rows that cannot be read.

    Raises:
        DataError: It is damaged, or an object's values have other types than in most.
    """
    if begins_a_list(file):
        text = file.read()
        try:
            objects = parsed(text)
        except json.JSONDecodeError as error:
            if error.msg != _MORE:  # which are lists in lines, and refused as such below
                raise DataError(
                    f"`{path}` is damaged in line {error.lineno:,}: {error}."
                ) from error
        except ValueError as error:
            raise DataError(f"`{path}` cannot be read: {error}.") from error
        else:
            rows = {row: (f"row {row:,}", found) for row, found in enumerate(objects, 1)}
            return _columns(path, rows, bad)
    file.seek(0)
    return columns_of_objects(path, file, bad)


def begins_a_list(file: TextIO) -> bool:
    """Whether a file's first character is that of a list; it is read from its beginning again."""
    first = next((line for line in file if line.strip()), "")
    file.seek(0)
    return first.lstrip().startswith("[")


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
    rows: dict[int, tuple[str, Any]] = {}
    filled = ((number, line) for number, line in enumerate(lines, first) if line.strip())
    for row, (number, line) in enumerate(filled, 1):
        if not is_utf8(line, path, bad, row):
            continue
        try:
            rows[row] = f"line {number:,}", parsed(line)
        except ValueError as error:
            bad.refuse(f"`{path}` is damaged in line {number:,}: {error}.", row)
    return _columns(path, rows, bad)


def _columns(
    path: Path, found: Mapping[int, tuple[str, Any]], bad: BadRows
) -> dict[str, list[Any]]:
    """Return the columns of objects, given by their row's number and with the place of each."""
    rows: dict[int, dict[str, Any]] = {}
    for row, (place, value) in found.items():
        if isinstance(value, dict) and _kind(value) != _BROKEN_KEY:
            rows[row] = value
        else:
            bad.refuse(
                f"`{path}` must hold one JSON object in each row, but has "
                f"{_kind(value) or 'nothing'} in {place}.",
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
    kinds = {row: dict.fromkeys(_kinds(name, found.get(name))) for row, found in rows.items()}
    counts = Counter(pair for found in kinds.values() for pair in found)
    common: dict[str, str] = {}
    for (place, kind), _ in counts.most_common():
        common.setdefault(place, _USABLE.get(kind, kind))
    odd = {
        row: min(pair for pair in found if common[pair[0]] != pair[1])
        for row, found in kinds.items()
        if any(common[place] != kind for place, kind in found)
    }
    return {
        row: f"`{path}` must hold {common[place]} as `{place}`, but has {kind} in row {row:,}."
        if kind in _USABLE
        else f"`{path}` must hold values of one type a column, but `{place}` is {kind} in row "
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
    elif isinstance(value, dict) and kind != _BROKEN_KEY:
        for key, item in value.items():
            yield from _kinds(f"{place}.{key}", item)


def _kind(value: Any) -> str:
    """Return what a person calls the type of a value of JSON; empty for none."""
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return _LONG
    if isinstance(value, str) and not (value.isascii() or is_unicode(value)):
        return _BROKEN
    if isinstance(value, dict) and not all(map(is_unicode, value)):
        return _BROKEN_KEY
    kinds = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), "")


def _is_deep(value: Any) -> bool:
    """Whether lists and objects stand in each other further than anything here goes down."""
    level = [value]
    for _ in range(_DEEPEST + 1):
        lists = [one.values() if isinstance(one, dict) else one for one in level]
        level = [inner for one in lists for inner in one if isinstance(inner, list | dict)]
    return bool(level)
