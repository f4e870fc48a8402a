"""Rows from files and from the hub, read strictly: what is wrong is named with file and row."""

import csv
import glob
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lightning_peft.data.bad_rows import SKIP, BadRows, is_utf8
from lightning_peft.data.conll import read_conll
from lightning_peft.data.json_lines import begins_a_list, columns_of_json, columns_of_objects
from lightning_peft.data.squad import read_squad, settle_answers
from lightning_peft.errors import DataError, near_misses
from lightning_peft.models import HubAnswer, ask_hub

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from pyarrow.parquet import ParquetFile

FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".conll": "conll",
    ".bio": "conll",
    ".iob": "conll",
    ".iob2": "conll",
    ".txt": "txt",
}
"""Format by the file's extension."""

_KNOWN = (*dict.fromkeys(FORMATS.values()), "squad")


def read_file(
    path: str | Path,
    file_format: str | None = None,
    columns: Sequence[str] | None = None,
    bad: BadRows | None = None,
) -> "Dataset":
    """Read one file of rows into memory; texts stay as they are written, `NA` included.

    Args:
        path: A file in UTF-8. Nothing is cached, so a changed file is never read stale.
        file_format: csv, tsv (tabs, no quoting), jsonl (objects, one a line or all in one list),
            parquet, txt (one text a line, column text), conll (one word a line, columns tokens and
            labels) or squad (questions in JSON, nested or one a line); None takes the extension's.
        columns: Names of the columns of a csv or tsv file without a header line.
        bad: What becomes of rows that cannot be read; None refuses the first.

    Raises:
        DataError: The file is missing, empty, of an unknown format, or damaged; with its line.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise DataError(f"`path` must be a file, but {str(path)!r} {_what_is(path)}")
    kind = _format(path, file_format)
    if columns is not None and kind not in ("csv", "tsv"):
        raise DataError(f"`columns` must be left out for {kind}, but is {list(columns)} instead.")
    bad = bad or BadRows()
    try:
        rows = _read_parquet(path) if kind == "parquet" else _read_text(path, kind, columns, bad)
    except UnicodeDecodeError as error:
        raise DataError(f"`{path}` must be UTF-8, but {_where_undecodable(path)}.") from error
    except OSError as error:
        raise DataError(f"`{path}` cannot be read: {error.strerror or error}.") from error
    if len(rows) == 0:
        reason = f": {bad.reasons[0]}" if bad.reasons else "."
        raise DataError(f"`{path}` must hold at least one row, but has none{reason}")
    return rows


def read_files(
    paths: Sequence[str | Path],
    file_format: str | None = None,
    columns: Sequence[str] | None = None,
    bad: BadRows | None = None,
) -> "Dataset":
    """Read several files of the same columns one after the other; see `read_file`."""
    from datasets import concatenate_datasets

    bad, tables = bad or BadRows(), []
    for path in paths:
        bad.begin_file(str(path))
        tables.append(read_file(path, file_format, columns, bad))
        bad.before = sum(map(len, tables)) + len(bad.unreadable)
    bad.before = 0
    first = tables[0].column_names
    for path, table in zip(paths, tables, strict=True):
        if set(table.column_names) != set(first):
            raise DataError(
                f"`{path}` must have the columns of `{paths[0]}` ({', '.join(first)}), but has "
                f"{', '.join(table.column_names)}."
            )
    try:
        return concatenate_datasets(tables) if len(tables) > 1 else tables[0]
    except ValueError as error:
        raise DataError(
            f"the files of `path` must hold values of the same types: {error}"
        ) from error


def stream_file(
    path: str | Path, file_format: str | None, bad: BadRows, size: int
) -> Iterator["Dataset"]:
    """Read a file of JSON lines or Parquet by blocks of at most `size` rows; see `read_file`.

    Raises:
        DataError: The file is missing, damaged, or of a format that is read as a whole.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise DataError(f"`path` must be a file, but {str(path)!r} {_what_is(path)}")
    kind = _format(path, file_format)
    if kind not in _STREAMED:
        raise DataError(
            f"`streaming` must be false for {kind}, which is read as a whole: write `{path}` as "
            f"JSON lines or Parquet."
        )
    try:
        yield from _STREAMED[kind](path, bad, size)
    except UnicodeDecodeError as error:
        raise DataError(f"`{path}` must be UTF-8, but {_where_undecodable(path)}.") from error
    except OSError as error:
        raise DataError(f"`{path}` cannot be read: {error.strerror or error}.") from error


def matching(path: str) -> list[str]:
    """Return the files that a path with `*`, `?` or `[...]` matches, by name; any other as it is.

    Raises:
        DataError: It matches none.
    """
    if not glob.has_magic(path) or Path(path).expanduser().exists():
        return [path]
    whole = Path(path).expanduser()
    found = sorted(map(str, Path(whole.anchor).glob(str(whole.relative_to(whole.anchor)))))
    if not found:
        raise DataError(f"`path` must match at least one file, but {path!r} matches none.")
    return found


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


def stream_hub(name: str, config: str | None, split: str, size: int) -> Iterator["Dataset"]:
    """Read a split of a data set on the hub by blocks of at most `size` rows, without a copy.

    Raises:
        DataError: There is no such data set or split, or the hub cannot be reached.
    """
    import datasets

    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        for block in rows.iter(size):
            yield datasets.Dataset.from_dict(block, features=rows.features)
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise DataError(f"the data set {name!r} cannot be streamed: {first}") from error


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


def bad_texts(
    rows: "Dataset",
    origin: str,
    column: str,
    number: Callable[[int], int] = lambda index: index + 1,
) -> dict[int, str]:
    """Return what is wrong with each row that has no text in `column`, by its index.

    Args:
        rows: As read.
        origin: What a person calls their file.
        column: Where the text should be.
        number: Gives the number in the file of the row with an index.
    """
    bad = {
        i: "is empty" if text is None or isinstance(text, str) else f"is {text!r}"
        for i, text in enumerate(rows[column][:])
        if not isinstance(text, str) or not text.strip()
    }
    more = f" ({len(bad):,} such rows)" if len(bad) > 1 else ""
    return {
        i: f"`{column}` must be a text in every row of {origin}, but {found} in row "
        f"{number(i):,}{more}: fill these rows, or {SKIP}."
        for i, found in bad.items()
    }


def _format(path: Path, file_format: str | None) -> str:
    if file_format is None:
        if path.suffix.lower() not in FORMATS:
            raise DataError(
                f"`path` must end in {', '.join(FORMATS)}, but is {str(path)!r} instead: "
                f"rename it, or set `format` to one of {', '.join(_KNOWN)}."
            )
        return FORMATS[path.suffix.lower()]
    if file_format not in _KNOWN:
        raise DataError(
            f"`format` must be one of {', '.join(_KNOWN)}, but is {file_format!r} instead."
            f"{near_misses(file_format, _KNOWN)}"
        )
    return file_format


def _what_is(path: Path) -> str:
    if path.is_dir():
        return "is a folder."
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    return f"does not exist.{near_misses(path.name, siblings)}"


def _read_text(path: Path, kind: str, columns: Sequence[str] | None, bad: BadRows) -> "Dataset":
    # Where bad rows are left out, bytes that are not UTF-8 must spoil none but their own row.
    errors = "surrogateescape" if bad.skip else "strict"
    with path.open(encoding="utf-8-sig", newline="", errors=errors) as file:
        if kind == "jsonl":
            table = columns_of_json(path, file, bad)
        elif kind == "conll":
            table = read_conll(path, file, bad)
        elif kind == "squad":
            table = _columns_of_questions(path, file, bad)
        elif kind == "txt":
            texts = (line.strip() for line in file)
            table = {"text": [text for text in texts if text and is_utf8(text, path, bad)]}
        else:
            table = _columns_of_fields(path, file, kind, columns, bad)
    return _as_rows(path, table)


def _as_rows(path: Path, table: dict[str, list[Any]]) -> "Dataset":
    from datasets import Dataset

    try:
        return Dataset.from_dict(table)
    except (TypeError, ValueError) as error:  # pyarrow's errors are these
        first = str(error).strip().splitlines()[0]
        raise DataError(f"`{path}` must hold values of one type a column: {first}") from error


def _columns_of_fields(
    path: Path, file: TextIO, kind: str, columns: Sequence[str] | None, bad: BadRows
) -> dict[str, list[str]]:
    lines = _fields(path, file, kind)
    header = list(columns) if columns is not None else next(lines, (0, []))[1]
    names = [name.strip() for name in header]
    if len(set(names)) < len(names):
        raise DataError(f"`{path}` must name each column once, but has {names}.")
    rows = []
    # Spaces, and separators behind which nothing stands, are no row but what editors leave.
    filled = (one for one in lines if len(one[1]) == len(names) or "".join(one[1]).strip())
    for number, (line, row) in enumerate(filled, 1):
        if len(row) != len(names):
            bad.refuse(
                f"`{path}` must have {len(names)} fields in each row ({', '.join(names)}), "
                f"but has {len(row)} in the row that ends in line {line:,}.",
                number,
            )
        elif is_utf8("".join(row), path, bad, number):
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
    except csv.Error as error:  # where the next row begins is then unknown
        raise DataError(f"`{path}` is damaged in line {reader.line_num:,}: {error}.") from error
    finally:
        csv.field_size_limit(limit)


def _columns_of_questions(path: Path, file: TextIO, bad: BadRows) -> dict[str, list[Any]]:
    table = read_squad(path, file, bad)
    if table is not None:
        return table
    file.seek(0)
    return settle_answers(path, columns_of_objects(path, file, bad), bad)


def _blocks_of_objects(path: Path, bad: BadRows, size: int) -> Iterator["Dataset"]:
    errors, first = "surrogateescape" if bad.skip else "strict", 1
    with path.open(encoding="utf-8-sig", newline="", errors=errors) as file:
        if begins_a_list(file):
            raise DataError(
                f"`streaming` must be false for a list of objects, which is read as a whole: write "
                f"`{path}` as JSON lines."
            )
        while lines := list(itertools.islice(file, size)):
            yield _as_rows(path, columns_of_objects(path, lines, bad, first))
            first += len(lines)


def _blocks_of_parquet(path: Path, bad: BadRows, size: int) -> Iterator["Dataset"]:
    from datasets import Dataset
    from datasets.table import InMemoryTable

    with _opened_parquet(path) as file:
        for batch in file.iter_batches(size):
            yield Dataset(InMemoryTable.from_batches([batch]))


def _read_parquet(path: Path) -> "Dataset":
    from datasets import Dataset
    from datasets.table import InMemoryTable

    with _opened_parquet(path) as file:
        return Dataset(InMemoryTable(file.read()))


@contextmanager
def _opened_parquet(path: Path) -> Iterator["ParquetFile"]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            yield file
    except (ArrowException, ValueError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise DataError(f"`{path}` cannot be read as Parquet: {first}") from error


_STREAMED = {"jsonl": _blocks_of_objects, "parquet": _blocks_of_parquet}


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
