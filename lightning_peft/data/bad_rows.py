"""Rows that cannot be used: the first one stops the reading, or each is left out and counted."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_peft.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

SKIP = "set `data.skip_bad_rows=true` to leave such rows out"
"""What ends a sentence about a bad row."""


class BadRows:
    """What becomes of the bad rows of one file, and how many there were.

    Args:
        skip: Leave them out and count them, instead of stopping at the first.
    """

    def __init__(self, skip: bool = False) -> None:
        self.skip = skip
        self.reasons: list[str] = []
        """Why each row was left out."""
        self.unreadable: set[int] = set()
        """The numbers in the file, from 1, of those that could not even be read as a row."""
        self.before = 0
        """How many rows of the file, or of earlier files, came before those that are read now."""
        self._files: list[tuple[int, str]] = []  # how many rows came before each

    def begin_file(self, name: str) -> None:
        """Take it that the rows of a file follow, which may be one of several."""
        self._files.append((self.before, name))

    def begin(self, before: int) -> None:
        """Take it that what is read now stands behind so many rows that are done with."""
        self.before = before
        self.unreadable.clear()

    def refuse(self, reason: str, row: int | None = None) -> None:
        """Note a bad row, or stop.

        Args:
            reason: What is wrong, as a sentence with the file and the place in it.
            row: The row's number among those that are read now, from 1, when it cannot even be
                read as a row.

        Raises:
            DataError: Bad rows are not to be left out.
        """
        if not self.skip:
            raise DataError(reason)
        self.reasons.append(reason)
        if row is not None:
            self.unreadable.add(self.before + row)

    def number(self, index: int) -> int:
        """Return the number in the file, from 1, of the row that was read as number `index`."""
        number = self.before + index + 1
        for unreadable in sorted(self.unreadable):
            number += unreadable <= number
        return number

    def place(self, index: int) -> str:
        """Return which row of which of several files was read as number `index`; empty for one."""
        if len(self._files) < 2:
            return ""
        number = self.number(index)
        before, name = max(file for file in self._files if file[0] < number)
        return f" That is row {number - before:,} of `{name}`."

    def without(self, rows: "Dataset", problems: Mapping[int, str]) -> "Dataset":
        """Return the rows but for those with a problem.

        Args:
            rows: As read.
            problems: What is wrong, by the row's index, the first row first.

        Raises:
            DataError: Bad rows are not to be left out.
        """
        if not problems:
            return rows
        for index, reason in problems.items():
            self.refuse(f"{reason}{self.place(index)}")
        return rows.select([i for i in range(len(rows)) if i not in problems])


def is_utf8(text: str, path: Path, bad: BadRows, row: int | None = None) -> bool:
    """Whether a text that was read with `surrogateescape` holds no undecodable byte.

    Raises:
        DataError: It does, and bad rows are not to be left out.
    """
    if not is_unicode(text):
        bad.refuse(f"`{path}` must be UTF-8, but is not in {text[:40]!r}.", row)
        return False
    return True


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: lone surrogates cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
