"""From a column of labels to class numbers."""

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lightning_peft.errors import DataError, near_misses

if TYPE_CHECKING:
    from datasets import Dataset

_WHOLE = re.compile(r"-?\d{1,18}")
_MANY = 20  # distinct labels from which on a column of nearly unique values looks like a wrong one


def infer_labels(rows: "Dataset", column: str, origin: str) -> tuple[str, ...]:
    """Return the distinct labels in ascending order, as numbers if all of them are whole numbers.

    Labels that the data set itself names (`ClassLabel` of the hub) keep its order.

    Raises:
        DataError: A label is missing, all rows have the same one, or the column holds no classes.
    """
    from datasets import ClassLabel

    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        return tuple(feature.names)
    names = set(_names(rows, column, origin))
    if len(names) < 2:
        raise DataError(
            f"`{column}` must have at least two different labels, but all {len(rows):,} rows of "
            f"{origin} have {names.pop()!r}: check that `label` names the right column."
        )
    if len(names) > max(_MANY, len(rows) // 2):
        raise DataError(
            f"`{column}` must hold classes, but {origin} has {len(names):,} different values in "
            f"{len(rows):,} rows: check that `label` names the right column."
        )
    by_name = sorted(names)  # so that the order of 1 and 01 is always the same
    whole = all(map(_WHOLE.fullmatch, names))
    return tuple(sorted(by_name, key=int) if whole else by_name)


def encode(rows: "Dataset", column: str, labels: Sequence[str], origin: str) -> list[int]:
    """Return the class number of each row.

    Raises:
        DataError: A label is missing or not among `labels`; its row is named.
    """
    for reason in bad_labels(rows, column, labels, origin).values():
        raise DataError(reason)
    numbers = {name: i for i, name in enumerate(labels)}
    return [numbers[name] for name in _names(rows, column, origin)]


def bad_labels(
    rows: "Dataset",
    column: str,
    labels: Sequence[str] | None,
    origin: str,
    number: Callable[[int], int] = lambda index: index + 1,
) -> dict[int, str]:
    """Return what is wrong with each row whose label cannot be one, by its index.

    Args:
        rows: As read.
        column: Where the labels are.
        labels: Those that there are; None where the rows themselves say so.
        origin: What a person calls their file.
        number: Gives the number in the file of the row with an index.
    """
    bad = {}
    for i, value in enumerate(_values(rows, column)):
        place = f"row {number(i):,}"
        if value is None or str(value).strip() == "":
            bad[i] = (
                f"`{column}` must be given in every row of {origin}, but is missing in {place}."
            )
        elif isinstance(value, (list, dict)) or (isinstance(value, float) and value % 1):
            bad[i] = f"`{column}` must be one class, but is {value!r} in {place} of {origin}."
        elif labels is not None and _name(value) not in labels:
            bad[i] = (
                f"`{column}` must be one of {', '.join(labels)}, but is {_name(value)!r} in "
                f"{place} of {origin}.{near_misses(_name(value), labels)}"
            )
    return bad


def _names(rows: "Dataset", column: str, origin: str) -> list[str]:
    """Return the labels as texts."""
    for reason in bad_labels(rows, column, None, origin).values():
        raise DataError(reason)
    return [_name(value) for value in _values(rows, column)]


def _name(value: Any) -> str:
    # Tables store a whole number beside gaps as 1.0, which means 1.
    return str(int(value) if isinstance(value, float) else value).strip()


def _values(rows: "Dataset", column: str) -> list[Any]:
    """Return the column, the classes of a data set that names them by their names."""
    from datasets import ClassLabel

    feature = rows.features[column]
    values: list[Any] = rows[column][:]  # at once; an iterator would ask for each row alone
    if isinstance(feature, ClassLabel):
        return [feature.int2str(v) if v is not None and v >= 0 else None for v in values]
    return values
