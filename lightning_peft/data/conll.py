"""Sentences in CoNLL columns: a word a line, its label last, an empty line after each sentence."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from lightning_peft.data.bad_rows import BadRows

_LABEL = re.compile(r"O|[BIESLU]-\S+")
_DOCUMENT = "-DOCSTART-"  # CoNLL-2003 begins each document with a sentence of this word


def read_conll(path: Path, file: TextIO, bad: BadRows) -> dict[str, list[list[str]]]:
    """Return the columns `tokens` and `labels`, a list for each sentence.

    Columns are parted by tabs or else by spaces; the word is the first, the label the last. Files
    with words alone have no `labels`. Lines that begin with `# ` and end in no label are comments.

    Args:
        path: Its name, for errors.
        file: Open for reading.
        bad: What becomes of sentences that cannot be read.

    Raises:
        DataError: A line has no label while others have one, or is not UTF-8.
    """
    tokens, labels = [], []
    labelled = None
    for row, sentence in enumerate(_sentences(file), 1):
        if labelled is None:
            labelled = len(sentence[0][1]) > 1
        problem = _problem(path, sentence, labelled)
        if problem:
            bad.refuse(problem, row)
            continue
        tokens.append([fields[0] for _, fields in sentence])
        labels.append([fields[-1] for _, fields in sentence])
    return {"tokens": tokens, "labels": labels} if labelled else {"tokens": tokens}


def _sentences(file: TextIO) -> Iterator[list[tuple[int, list[str]]]]:
    """Yield the lines of each sentence: their numbers and fields."""
    sentence: list[tuple[int, list[str]]] = []
    for number, line in enumerate(file, 1):
        fields = _fields(line)
        if fields and fields[0] != _DOCUMENT:
            if not (line.startswith("# ") and not _LABEL.fullmatch(fields[-1])):
                sentence.append((number, fields))
        elif sentence:
            yield sentence
            sentence = []
    if sentence:
        yield sentence


def _fields(line: str) -> list[str]:
    if not line.strip():
        return []
    if "\t" in line:
        return [field.strip() for field in line.strip("\r\n").split("\t")]
    return re.split(" +", line.strip(" \r\n"))  # no other space parts words


def _problem(path: Path, sentence: list[tuple[int, list[str]]], labelled: bool) -> str:
    for number, fields in sentence:
        if labelled and (len(fields) < 2 or not fields[-1]):
            return (
                f"`{path}` must have a word and its label in each line, but has {fields} in line "
                f"{number:,}."
            )
        if not fields[0]:
            return f"`{path}` must have a word in each line, but has none in line {number:,}."
        try:
            "".join(fields).encode()
        except UnicodeEncodeError:
            return f"`{path}` must be UTF-8, but is not in line {number:,}."
    return ""
