"""From a column of labels to class numbers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_peft.errors import DataError, near_misses

if TYPE_CHECKING:
    from datasets import Dataset

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
    whole = all(name.lstrip("-").isdecimal() for name in names)
    return tuple(sorted(names, key=int) if whole else sorted(names))


def encode(rows: "Dataset", column: str, labels: Sequence[str], origin: str) -> list[int]:
    """Return the class number of each row.

    Raises:
        DataError: A label is missing or not among `labels`; its row is named.
    """
    numbers = {name: i for i, name in enumerate(labels)}
    names = _names(rows, column, origin)
    for row, name in enumerate(names, 1):
        if name not in numbers:
            raise DataError(
                f"`{column}` must be one of {', '.join(labels)}, but is {name!r} in row {row:,} of "
                f"{origin}.{near_misses(name, labels)}"
            )
    return [numbers[name] for name in names]


def _names(rows: "Dataset", column: str, origin: str) -> list[str]:
    """Return the labels as texts: 1.0, as tables store a whole number beside gaps, as 1."""
    from datasets import ClassLabel

    feature = rows.features[column]
    values: list[Any] = list(rows[column])
    if isinstance(feature, ClassLabel):
        return [feature.int2str(v) if v is not None and v >= 0 else "" for v in values]
    for row, value in enumerate(values, 1):
        if value is None or str(value).strip() == "":
            raise DataError(
                f"`{column}` must be given in every row of {origin}, but is missing in row {row:,}."
            )
        if isinstance(value, (list, dict)) or (isinstance(value, float) and value % 1):
            raise DataError(
                f"`{column}` must be one class, but is {value!r} in row {row:,} of {origin}."
            )
    return [str(int(v) if isinstance(v, float) else v).strip() for v in values]
