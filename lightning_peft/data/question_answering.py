"""Questions whose answers are spans of a context, as batches of windows of tokens."""

from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any

from lightning_peft.data.bad_rows import SKIP
from lightning_peft.data.choices import Choice, Loading
from lightning_peft.data.origin import Origin
from lightning_peft.data.splits import connected, grouped_split, normalised
from lightning_peft.data.squad import answers_of
from lightning_peft.data.texts import tokenised
from lightning_peft.data.tokenised import TokenisedData
from lightning_peft.data.windows import TokeniseQuestions, WindowCollator, check_windows
from lightning_peft.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

_SQUAD = dict.fromkeys((".json", ".jsonl", ".ndjson"), "squad")
_LANGUAGE = "{language}"


class QuestionData(TokenisedData):
    """Questions, each with a context and with the answers that stand in it.

    A row has a question, its context and `answers`: the texts and where each begins, counted in
    characters from 0. JSON in the format of SQuAD (1.1 and 2.0) gives them, and so do JSON lines
    and Parquet with these columns. A question without answers cannot be answered from its context.

    A context of more than fits into `max_length` tokens becomes several windows in the same batch,
    of which neighbours share `stride` tokens, so that one row stays one question. Drawn splits keep
    documents whole: rows of one title, or of one context, are never torn apart, unless all rows are
    of one document.

    Batches are dictionaries. Tensors: `input_ids`, `attention_mask` and, where the model reads
    them, `token_type_ids`, all `(windows, tokens)`; `labels` `(windows, 2)`, first and last token
    of the answer, the null token's place where a window has none, and -100 where it cuts it;
    `row_numbers` `(windows,)`, the question of each window; `row_offsets` `(windows, tokens, 2)`,
    each token's characters in the context, -1 outside; `row_null` `(windows,)`, the place of the
    null token. Lists by question: `row_contexts` and `row_answers`, the right texts.

    Args:
        path: One file, for `predict` the one to judge and else the one to train on; or files by
            split: train, validation, test, predict. `{language}` in it stands for `language`.
        language: What `{language}` in `path` stands for.
        hub: Name of a data set on the hub.
        hub_config: Its configuration, where it has several.
        format: Format of the files (squad, parquet, csv, ...); None takes it from each name.
        question: Column of the questions.
        context: Column of the contexts.
        answers: Column of the answers; not read for `predict`.
        identity: Column of what names a question, where there is one.
        title: Column of the document's title, where there is one.
        validation: Share of the training rows to hold out where there is no validation split.
        test: Share of the training rows to hold out where there is no test split; None draws none.
        seed: Seed of these draws and of `limit`.
        batch_size: Questions in a batch.
        max_length: Tokens of a window, the question included.
        stride: Tokens of the context that a window shares with the next.
        limit: At most so many rows of each split, drawn by seed; for trials.
        skip_bad_rows: Leave rows out that cannot be used, and count them.
        by_length: Train on batches of like lengths, which have little padding.
        num_workers: Processes that load batches.

    Raises:
        ConfigError: `max_length` or `stride` is out of its range, or `language` is missing.
    """

    asks = "the characters"

    def __init__(
        self,
        *,
        path: str | Mapping[str, str] | None = None,
        language: str | None = None,
        hub: str | None = None,
        hub_config: str | None = None,
        format: str | None = None,  # noqa: A002  # the word that users know
        question: str = "question",
        context: str = "context",
        answers: str = "answers",
        identity: str = "id",
        title: str = "title",
        validation: float = 0.1,
        test: float | None = None,
        seed: int = 0,
        batch_size: int = 16,
        max_length: int = 384,
        stride: int = 128,
        limit: int | None = None,
        skip_bad_rows: bool = False,
        by_length: bool = False,
        num_workers: int = 0,
    ) -> None:
        check_windows(max_length, stride)
        files = _in_language(path, language)
        super().__init__(
            Origin(path=files, hub=hub, hub_config=hub_config, format=format, formats=_SQUAD),
            Choice(
                validation=validation,
                test=test,
                seed=seed,
                limit=limit,
                skip_bad_rows=skip_bad_rows,
            ),
            Loading(batch_size=batch_size, num_workers=num_workers, by_length=by_length),
        )
        self.question, self.context, self.answers = question, context, answers
        self.identity, self.title = identity, title
        self.max_length, self.stride = max_length, stride

    @property
    def unanswerable(self) -> bool:
        """Whether there are training questions without an answer; reads them if need be."""
        return any(not answers["text"] for answers in self.table("train")[self.answers])

    def columns(self, split: str, rows: "Dataset") -> dict[str, str | None]:
        wanted: dict[str, str | None] = {"question": self.question, "context": self.context}
        return wanted if split == "predict" else wanted | {"answers": self.answers}

    def problems(self, split: str, rows: "Dataset", number: Callable[[int], int]) -> dict[int, str]:
        names, titles = self._named(rows, self.identity), self._named(rows, self.title)
        answers = [None] * len(rows) if split == "predict" else rows[self.answers]
        asked = zip(names, titles, rows[self.question], rows[self.context], answers, strict=True)
        known: dict[Any, int] = {}
        found = {}
        for i, (name, title, question, context, given) in enumerate(asked):
            wrong = self._bad_texts(question, context) or self._bad_names(name, title, known)
            if not wrong and split != "predict":
                wrong = self._bad_answers(given, context)
            if name is not None and isinstance(name, Hashable):
                known.setdefault(name, number(i))
            if wrong:
                called = f" ({self.identity} {name!r})" if name is not None else ""
                where = f"row {number(i):,}{called} of {self.origin.name(split)}"
                found[i] = f"{where} cannot be used: {wrong}: correct it, or {SKIP}."
        return found

    def formed(self, split: str, rows: "Dataset") -> "Dataset":
        from datasets import Dataset

        if self.answers not in rows.column_names or split == "predict":
            return rows
        columns = {name: list(rows[name]) for name in rows.column_names}
        return Dataset.from_dict(
            columns | {self.answers: list(map(answers_of, rows[self.answers]))}
        )

    def keys(self, rows: "Dataset") -> list[Hashable]:
        questions, contexts = (map(normalised, rows[c]) for c in (self.question, self.context))
        return list(zip(questions, contexts, strict=True))

    def strata(self, split: str, rows: "Dataset") -> list[int]:
        return [0] * len(rows)

    def drawn(self, split: str, rows: "Dataset", share: float) -> tuple[list[int], list[int]]:
        contexts = map(normalised, rows[self.context])
        documents = connected(self._named(rows, self.title), list(contexts))
        return grouped_split(documents, share, self.choice.seed)

    def items(self, split: str, rows: "Dataset") -> "Dataset":
        answers = None if split == "predict" else self.answers
        windows = TokeniseQuestions(
            self.tokenizer, self.question, self.context, answers, self.max_length, self.stride
        )
        return tokenised(rows, windows)

    def collator(self) -> WindowCollator:
        tool = self.tokenizer
        return WindowCollator(
            int(tool.pad_token_id or 0), int(tool.pad_token_type_id), tool.padding_side
        )

    def inputs(self, split: str) -> list[dict[str, str]]:
        rows = self.chosen(split)
        both = zip(rows[self.question], rows[self.context], strict=True)
        return [{"question": question, "context": context} for question, context in both]

    def targets(self, split: str) -> list[list[str]]:
        return [answers["text"] for answers in self.chosen(split)[self.answers]]

    def _bad_texts(self, question: Any, context: Any) -> str:
        for column, value in ((self.question, question), (self.context, context)):
            if not isinstance(value, str) or not value.strip():
                found = "is empty" if value is None or isinstance(value, str) else f"is {value!r}"
                return f"`{column}` must be a text, but {found}"
        return ""

    def _named(self, rows: "Dataset", column: str) -> list[Any]:
        return list(rows[column]) if column in rows.column_names else [None] * len(rows)

    def _bad_names(self, name: Any, title: Any, known: Mapping[Any, int]) -> str:
        for column, value in ((self.identity, name), (self.title, title)):
            if not isinstance(value, Hashable):
                return f"`{column}` must be a text or a number, but is {value!r}"
        if name not in known:
            return ""
        return f"`{self.identity}` must name one question, but row {known[name]:,} has the same"

    def _bad_answers(self, value: Any, context: str) -> str:
        answers = answers_of(value)
        if answers is None:
            return f"`{self.answers}` must be a list, empty for a question without one, but is none"
        if isinstance(answers, str):
            return answers
        for text, start in zip(answers["text"], answers["answer_start"], strict=True):
            wrong = misplaced(text, start, context)
            if wrong:
                return wrong
        return ""


def misplaced(text: str, start: int, context: str) -> str:
    """Return what is wrong with the place of an answer; empty for nothing.

    Args:
        text: The answer.
        start: The number of its first character in `context`, from 0.
        context: Where it should stand.
    """
    if not text.strip():
        return "`text` of an answer must not be empty, but is"
    if start >= 0 and context.startswith(text, start):
        return ""
    places = [i for i in range(len(context)) if context.startswith(text, i)]
    there = context[max(0, start) : max(0, start) + len(text)]
    said = f"the answer {text!r} must stand at character {start:,} of its context, but there is "
    said += repr(there) if there else f"nothing (it has {len(context):,})"
    if not places:
        return f"{said}, and nowhere else does it stand in it"
    nearest = min(places, key=lambda place: abs(place - start))
    return f"{said}; the nearest is at {nearest:,}"


def _in_language(
    path: str | Mapping[str, str] | None, language: str | None
) -> str | Mapping[str, str] | None:
    """Return the path or paths with the language's name in them."""
    if isinstance(path, Mapping):
        return {split: str(_in_language(file, language)) for split, file in path.items()}
    if path is None or _LANGUAGE not in path:
        return path
    if language is None:
        raise ConfigError(
            f"`language` must be given for a path with `{_LANGUAGE}`, but is None instead."
        )
    return path.replace(_LANGUAGE, language)
