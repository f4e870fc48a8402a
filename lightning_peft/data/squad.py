"""The format of SQuAD: articles of paragraphs with questions, and the answers' places in them."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from lightning_peft.data.bad_rows import BadRows, is_unicode
from lightning_peft.data.json_lines import parsed
from lightning_peft.errors import DataError

_NESTED = {"data": "articles", "paragraphs": "paragraphs", "qas": "questions"}
_NAMES = ("id", "title")  # which some files give as numbers
_TEXTS = (*_NAMES, "context", "question")
Answers = dict[str, list[Any]]
"""`{"text": [...], "answer_start": [...]}`, the answers of one question in the same order."""


def read_squad(path: Path, file: TextIO, bad: BadRows) -> dict[str, list[Any]] | None:
    """Return a row for each question of a JSON document; None where the file has one a line.

    Versions 1.1 and 2.0 (Rajpurkar et al. 2016, 2018) nest `data`, `paragraphs` and `qas`; rows
    that are not nested, in a list or under `data`, are read too.

    Args:
        path: Its name, for errors.
        file: Open for reading.
        bad: What becomes of questions that cannot be read.

    Returns:
        The columns id, title, context, question, and answers where the file has any.

    Raises:
        DataError: The document is damaged or nested otherwise, or a value has a wrong type.
    """
    document = _document(path, file.read())
    if document is None:
        return None
    rows = []
    for number, (place, found) in enumerate(_questions(document, {}, ""), 1):
        problem = _problem(found)
        if problem:
            bad.refuse(f"`{path}` cannot be used at {place or 'its top'}: {problem}.", number)
            continue
        rows.append({name: found.get(name) for name in _TEXTS} | {"answers": _answers_in(found)})
    columns = {name: [row[name] for row in rows] for name in (*_TEXTS, "answers")}
    return {name: c for name, c in columns.items() if any(value is not None for value in c)}


def settle_answers(path: Path, columns: dict[str, list[Any]], bad: BadRows) -> dict[str, list[Any]]:
    """Return columns that were read a row a line with their `answers` in one form.

    Raises:
        DataError: The answers of a row have no form that is known.
    """
    if "answers" not in columns:
        return columns
    found = [answers_of(value) for value in columns["answers"]]
    wrong = {bad.number(i) - bad.before: one for i, one in enumerate(found) if isinstance(one, str)}
    for row, problem in wrong.items():
        bad.refuse(f"`{path}` cannot be used in row {row:,}: {problem}.", row)
    kept = [i for i, one in enumerate(found) if not isinstance(one, str)]
    settled = columns | {"answers": found}
    return {name: [values[i] for i in kept] for name, values in settled.items()}


def answers_of(value: Any) -> Answers | str | None:
    """Return answers in one form, or what is wrong with them; None for none given.

    Args:
        value: A list of `{"text": ..., "answer_start": ...}`, one of these, or lists of both.
    """
    if value is None:
        return None
    if isinstance(value, Mapping):
        texts, starts = value.get("text"), value.get("answer_start")
    elif isinstance(value, list) and all(isinstance(one, Mapping) for one in value):
        texts = [one.get("text") for one in value]
        starts = [one.get("answer_start") for one in value]
    else:
        return f"`answers` must have `text` and `answer_start`, but is {_short(value)}"
    texts = [texts] if isinstance(texts, str) else texts
    starts = [starts] if _is_whole(starts) else starts
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        return f"`answers` must have a `text` for each `answer_start`, but is {_short(value)}"
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not is_unicode(text):
            return f"`text` of an answer must be a text in UTF-8, but is {_short(text)}"
        if not _is_whole(start):
            return f"`answer_start` must be a whole number, but is {_short(start)}"
    return {"text": texts, "answer_start": starts}


def _document(path: Path, text: str) -> Any:
    """Return the document; None where each line is one by itself."""
    try:
        document = parsed(text)
    except json.JSONDecodeError as error:
        first = text.lstrip().partition("\n")[0]
        if error.msg == "Extra data" or first.rstrip().endswith("}"):
            return None
        raise DataError(f"`{path}` is damaged in line {error.lineno:,}: {error}.") from error
    except ValueError as error:
        raise DataError(f"`{path}` cannot be read: {error}.") from error
    one_line = isinstance(document, dict) and "question" in document and "\n" not in text.strip()
    return None if one_line else document


def _questions(node: Any, known: dict[str, Any], place: str) -> Iterator[tuple[str, Any]]:
    """Yield each question with what is said of it further up, or what is wrong with the nesting.

    Its place comes first: `data[0].paragraphs[2].qas[1]`.
    """
    if isinstance(node, list) and not place:
        node = {"data": node}
    name = next((name for name in _NESTED if isinstance(node, dict) and name in node), None)
    if name is None:
        asked = isinstance(node, dict) and "question" in node
        yield place, _named(known | node) if asked else _nested_otherwise(node)
        return
    above = known | {key: node[key] for key in ("title", "context") if key in node}
    place = f"{place}.{name}".removeprefix(".")
    if not isinstance(node[name], list):
        yield place, f"`{name}` must be a list of {_NESTED[name]}, but is {_short(node[name])}"
        return
    for i, inner in enumerate(node[name]):
        yield from _questions(inner, above, f"{place}[{i}]")


def _named(question: dict[str, Any]) -> dict[str, Any]:
    """Return a question with numbers in place of names as texts."""
    return question | {
        name: str(question[name]) for name in _NAMES if _is_whole(question.get(name))
    }


def _nested_otherwise(node: Any) -> str:
    shown = ", ".join(node) if isinstance(node, dict) else _short(node)
    return (
        "questions must be nested as `data`, `paragraphs`, `qas`, or be rows with `context` and "
        f"`question`, but here is {shown or 'nothing'}"
    )


def _problem(found: dict[str, Any] | str) -> str:
    """Return what keeps a question from being a row; what else is wrong shows by its columns."""
    if isinstance(found, str):
        return found
    for name in _TEXTS:
        value = found.get(name)
        if value is not None and not isinstance(value, str):
            return f"`{name}` must be a text, but is {_short(value)}"
        if value is not None and not is_unicode(value):
            return f"`{name}` must be UTF-8, but is not in {value[:40]!r}"
    answers = _answers_in(found)
    return answers if isinstance(answers, str) else ""


def _answers_in(found: Mapping[str, Any]) -> Answers | str | None:
    """Return the answers of a question, none of them where it is marked impossible."""
    answers = answers_of(found.get("answers"))
    if not found.get("is_impossible") or isinstance(answers, str):
        return answers
    if answers is not None and answers["text"]:
        return "`is_impossible` must be false for a question with answers, but is true"
    return {"text": [], "answer_start": []}


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:79]}…"
