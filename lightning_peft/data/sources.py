"""Rows from files and from the hub, read strictly: what is wrong is named with file and row."""

import csv
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lightning_peft.errors import DataError, near_misses
from lightning_peft.models import HubAnswer, ask_hub

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
"""Format by the file's extension."""


def read_file(
    path: str | Path, file_format: str | None = None, columns: Sequence[str] | None = None
) -> "Dataset":
    """Read one file of rows into memory; texts stay as they are written, `NA` included.

    Args:
        path: A file in UTF-8. Nothing is cached, so a changed file is never read stale.
        file_format: csv, tsv (tabs, no quoting), jsonl (one object a line) or parquet; None takes
            the extension's.
        columns: Names of the columns of a csv or tsv file without a header line.

    Raises:
        DataError: The file is missing, empty, of an unknown format, or damaged; with its line.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise DataError(f"`path` must be a file, but {str(path)!r} {_what_is(path)}")
    kind = _format(path, file_format)
    if columns is not None and kind not in ("csv", "tsv"):
        raise DataError(f"`columns` must be left out for {kind}, but is {list(columns)} instead.")
    try:
        rows = _read_parquet(path) if kind == "parquet" else _read_text(path, kind, columns)
    except UnicodeDecodeError as error:
        raise DataError(f"`{path}` must be UTF-8, but {_where_undecodable(path)}.") from error
    except OSError as error:
        raise DataError(f"`{path}` cannot be read: {error.strerror or error}.") from error
    if len(rows) == 0:
        raise DataError(f"`{path}` must hold at least one row, but has none.")
    return rows


def read_hub(name: str, config: str | None = None) -> "DatasetDict":
    """Read the splits of a data set on the hub, from its local copy where one was made before.

    Raises:
        DataError: There is no such data set or config, or the hub cannot be reached.
    """
    import datasets

    copy = Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")
    answer = HubAnswer.FOUND if copy.is_dir() else ask_hub(name, kind="dataset")
    if answer is not HubAnswer.FOUND:
        raise DataError(
            f"`hub` must be a data set on the hub, but {name!r} {answer.value}: "
            f"check the name and the network, or give the rows as files in `path`."
        )
    try:
        return datasets.load_dataset(name, config)
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise DataError(f"the data set {name!r} cannot be read: {first}") from error


def require_columns(rows: "Dataset", origin: str, **wanted: str | None) -> None:
    """Check that `rows` has the columns, given as `setting=column`; None is not needed.

    Raises:
        DataError: A column is missing; near misses and those that exist are named.
    """
    for setting, column in wanted.items():
        if column is not None and column not in rows.column_names:
            raise DataError(
                f"`{setting}` must be a column of {origin} ({', '.join(rows.column_names)}), "
                f"but is {column!r} instead.{near_misses(column, rows.column_names)}"
            )


def require_texts(rows: "Dataset", origin: str, column: str) -> None:
    """Check that every row has a text in `column`.

    Raises:
        DataError: Some have none, or hold something else; the first is named by its number.
    """
    values = rows[column]
    bad = [i for i, text in enumerate(values) if not isinstance(text, str) or not text.strip()]
    if bad:
        value = values[bad[0]]
        found = "is empty" if value is None or isinstance(value, str) else f"is {value!r}"
        more = f" ({len(bad):,} such rows)" if len(bad) > 1 else ""
        raise DataError(
            f"`{column}` must be a text in every row of {origin}, but {found} in row "
            f"{bad[0] + 1:,}{more}: fill these rows or leave them out."
        )


def _format(path: Path, file_format: str | None) -> str:
    known = sorted(set(FORMATS.values()))
    if file_format is None:
        if path.suffix.lower() not in FORMATS:
            raise DataError(
                f"`path` must end in {', '.join(FORMATS)}, but is {str(path)!r} instead: "
                f"rename it, or set `format` to one of {', '.join(known)}."
            )
        return FORMATS[path.suffix.lower()]
    if file_format not in known:
        raise DataError(
            f"`format` must be one of {', '.join(known)}, but is {file_format!r} instead."
            f"{near_misses(file_format, known)}"
        )
    return file_format


def _what_is(path: Path) -> str:
    if path.is_dir():
        return "is a folder."
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    return f"does not exist.{near_misses(path.name, siblings)}"


def _read_text(path: Path, kind: str, columns: Sequence[str] | None) -> "Dataset":
    from datasets import Dataset

    with path.open(encoding="utf-8-sig", newline="") as file:
        if kind == "jsonl":
            table = _columns_of_objects(path, file)
        else:
            table = _columns_of_fields(path, file, kind, columns)
    try:
        return Dataset.from_dict(table)
    except (TypeError, ValueError) as error:  # pyarrow's errors are these
        first = str(error).strip().splitlines()[0]
        raise DataError(f"`{path}` must hold values of one type a column: {first}") from error


def _columns_of_fields(
    path: Path, file: TextIO, kind: str, columns: Sequence[str] | None
) -> dict[str, list[str]]:
    lines = _fields(path, file, kind)
    names = list(columns) if columns is not None else next(lines, (0, []))[1]
    if len(set(names)) < len(names):
        raise DataError(f"`{path}` must name each column once, but has {names}.")
    rows = []
    for line, row in lines:
        if len(row) != len(names):
            raise DataError(
                f"`{path}` must have {len(names)} fields in each row ({', '.join(names)}), "
                f"but has {len(row)} in the row that ends in line {line:,}."
            )
        rows.append(row)
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def _fields(path: Path, file: TextIO, kind: str) -> Iterator[tuple[int, list[str]]]:
    """Yield each row that is not blank with the number of its last line."""
    # A lone quotation mark is text in a tsv file, where it would else swallow the lines after it.
    if kind == "tsv":
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(file, strict=True)
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield from ((reader.line_num, row) for row in reader if row)
    except csv.Error as error:
        raise DataError(f"`{path}` is damaged in line {reader.line_num:,}: {error}.") from error
    finally:
        csv.field_size_limit(limit)


def _columns_of_objects(path: Path, file: TextIO) -> dict[str, list[Any]]:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"`{path}` is damaged in line {number:,}: {error}.") from error
        if not isinstance(row, dict):
            raise DataError(
                f"`{path}` must hold one JSON object in each line, but has "
                f"{type(row).__name__} in line {number:,}."
            )
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _read_parquet(path: Path) -> "Dataset":
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    with tempfile.TemporaryDirectory() as cache, hidden_progress():
        try:
            return Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)
        except (DatasetGenerationError, ValueError) as error:
            cause = str(error.__cause__ or error).strip().splitlines()[0]
            raise DataError(f"`{path}` cannot be read as Parquet: {cause}") from error


def _where_undecodable(path: Path) -> str:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return (
                    f"has the byte 0x{line[error.start]:02x} in line {number:,}: convert the file"
                )
    return "ends within a character: convert the file"


@contextmanager
def hidden_progress(hide: bool = True) -> Iterator[None]:
    """Hide the progress bars of `datasets` for a while, unless they were hidden already."""
    import datasets

    if not hide or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
