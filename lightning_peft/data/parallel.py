"""Parallel text: plain files with a sentence a line, whose lines belong together by number."""

import gzip
import re
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_peft.data.bad_rows import BadRows, is_unicode
from lightning_peft.data.sources import matching
from lightning_peft.errors import DataError, near_misses

if TYPE_CHECKING:
    from datasets import Dataset

_OPEN = re.compile(r"[*?]+|\[[^]]*\]")  # what a pattern leaves open


def read_parallel(files: Mapping[str, str], bad: BadRows) -> "Dataset":
    """Read files line by line into a column each; empty lines stay, for rows are told by number.

    Args:
        files: Their paths by the column's name; a name that ends in `.gz` is unpacked, and one with
            `*`, `?` or `[...]` stands for several files, one after the other.
        bad: What becomes of rows with a line that is not UTF-8.

    Raises:
        DataError: A file is missing, damaged or empty, the files have different numbers of lines,
            a line is not UTF-8, or one of several files has no counterpart.
    """
    from datasets import Dataset

    columns: dict[str, list[str]] = {name: [] for name in files}
    for group in _groups(files):
        bad.begin_file("` and `".join(group.values()))
        lines = _aligned(group, bad)
        for name in columns:
            columns[name] += lines[name]
        bad.before = len(columns[name]) + len(bad.unreadable)
    bad.before = 0
    return Dataset.from_dict(columns)


def _groups(files: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the files that belong together, in the order of what tells them apart."""
    found = {
        name: sorted(matching(file), key=partial(_open_parts, file)) for name, file in files.items()
    }
    differing = {tuple(_open_parts(files[name], file) for file in f) for name, f in found.items()}
    if len(differing) > 1 and any(len(several) > 1 for several in found.values()):
        told = " and ".join(f"`{files[name]}` is {_shown(f)}" for name, f in found.items())
        raise DataError(
            f"parallel files must differ from each other in the same places, but {told}: add the "
            f"file that is missing, or rename it."
        )
    return [dict(zip(found, group, strict=True)) for group in zip(*found.values(), strict=True)]


def _open_parts(pattern: str, file: str) -> tuple[str, ...]:
    """Return what stands in a file's path where a pattern leaves it open."""
    fixed = _OPEN.split(str(Path(pattern).expanduser()))
    found = re.fullmatch("(.*)".join(map(re.escape, fixed)), file)
    return found.groups() if found else ()


def _shown(files: list[str]) -> str:
    shown = ", ".join(Path(file).name for file in files[:5])
    return f"{shown} and {len(files) - 5:,} more" if len(files) > 5 else shown


def _aligned(files: Mapping[str, str], bad: BadRows) -> dict[str, list[str]]:
    """Return the lines of files that belong together."""
    columns = {name: _lines(existing(file)) for name, file in files.items()}
    counts = {files[name]: len(lines) for name, lines in columns.items()}
    if len(set(counts.values())) > 1:
        found = " and ".join(f"`{file}` has {count:,}" for file, count in counts.items())
        raise DataError(
            f"parallel files must have as many lines as each other, but {found}: line n of one "
            f"belongs to line n of the other, so find the line that is missing."
        )
    unreadable = {
        i: f"`{files[name]}` must be UTF-8, but is not in line {i + 1:,}: convert the file."
        for name, lines in columns.items()
        for i, line in enumerate(lines)
        if not is_unicode(line)
    }
    for i, reason in sorted(unreadable.items()):
        bad.refuse(reason, i + 1)
    return {
        name: [line for i, line in enumerate(lines) if i not in unreadable]
        for name, lines in columns.items()
    }


def existing(file: str) -> Path:
    """Return the path of a file.

    Raises:
        DataError: It does not exist; near misses are named.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        close = near_misses(path.name, siblings)
        raise DataError(f"`path` must be a file, but {str(path)!r} does not exist.{close}")
    return path


def _lines(path: Path) -> list[str]:
    """Return the lines without their ends; bytes that are not UTF-8 become lone surrogates."""
    read = gzip.open if path.suffix == ".gz" else open
    try:
        # No other character but the line feed parts sentences, not even a lone carriage return.
        with read(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
            lines = [line.rstrip("\r\n") for line in file]
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"`{path}` cannot be read: {error}.") from error
    if not lines:
        raise DataError(f"`{path}` must hold at least one line, but has none.")
    return lines
