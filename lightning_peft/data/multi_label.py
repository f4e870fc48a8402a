"""Texts with any number of labels each, as padded batches."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_peft.data.bad_rows import SKIP
from lightning_peft.data.choices import Choice, Loading
from lightning_peft.data.origin import Origin
from lightning_peft.data.sources import bad_texts
from lightning_peft.data.texts import Tokenise, text_keys, tokenised
from lightning_peft.data.tokenised import TokenisedData
from lightning_peft.errors import ConfigError, DataError, near_misses

if TYPE_CHECKING:
    from datasets import Dataset

_MARKS = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}


class MultiLabelData(TokenisedData):
    """Texts with none, one or several labels each.

    The labels stand in one column, as a list or as a text with `separator` between them; or each
    has a column of its own that holds 0 or 1. Batches have `input_ids` and `attention_mask` of
    shape `(batch, tokens)`, and `labels` of shape `(batch, labels)`: 1.0 where a text has it.

    Args:
        path: One file, for `predict` the one to judge and else the one to train on; or files by
            split: train, validation, test, predict. CSV, TSV, JSON lines, Parquet, or for
            `predict` plain lines.
        hub: Name of a data set on the hub.
        hub_config: Its configuration, where it has several.
        format: Format of the files (csv, tsv, jsonl, parquet, txt); None takes it from each name.
        columns: Names of the columns of CSV or TSV files without a header line.
        text: Column of the texts.
        label: Column of the labels, or the columns of 0 and 1; not read for `predict`.
        separator: What stands between labels in a text.
        labels: The labels in the order of the model's outputs; None takes the columns, or those of
            the training rows in ascending order.
        validation: Share of the training rows to hold out where there is no validation split.
        seed: Seed of that draw and of `limit`.
        batch_size: Rows in a batch.
        max_length: Tokens at which a text is cut.
        limit: At most so many rows of each split, drawn by seed; for trials.
        skip_bad_rows: Leave rows out that cannot be used, and count them.
        by_length: Train on batches of like lengths, which have little padding.
        num_workers: Processes that load batches.
        streaming: Leave the training rows on disk or the hub, and read them block by block.
    """

    def __init__(
        self,
        *,
        path: str | Mapping[str, str] | None = None,
        hub: str | None = None,
        hub_config: str | None = None,
        format: str | None = None,  # noqa: A002  # the word that users know
        columns: Sequence[str] | None = None,
        text: str = "text",
        label: str | Sequence[str] = "labels",
        separator: str = ",",
        labels: Sequence[str] | None = None,
        validation: float = 0.1,
        seed: int = 0,
        batch_size: int = 32,
        max_length: int = 256,
        limit: int | None = None,
        skip_bad_rows: bool = False,
        by_length: bool = False,
        num_workers: int = 0,
        streaming: bool = False,
    ) -> None:
        super().__init__(
            Origin(path=path, hub=hub, hub_config=hub_config, format=format, columns=columns),
            Choice(validation=validation, seed=seed, limit=limit, skip_bad_rows=skip_bad_rows),
            Loading(
                batch_size=batch_size,
                num_workers=num_workers,
                by_length=by_length,
                streaming=streaming,
            ),
        )
        self.text, self.separator, self.max_length = text, separator, max_length
        self.label = label if isinstance(label, str) else tuple(label)
        known = labels if labels is not None or isinstance(label, str) else label
        self._labels = tuple(known) if known is not None else None
        if isinstance(self.label, tuple) and set(self._labels or ()) != set(self.label):
            raise ConfigError(
                f"`labels` must be the columns of `label` ({', '.join(self.label)}), but is "
                f"{self._labels} instead: leave it out."
            )

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels in the order of the model's outputs; reads the training rows if need be."""
        if self._labels is None:
            found = sorted({name for row in self._sets(self.table("train")) for name in row})
            if not found:
                raise DataError(
                    f"`{self.label}` must hold at least one label, but no row of "
                    f"{self.origin.name('train')} has any: check that `label` names the right "
                    f"column."
                )
            self._labels = tuple(found)
        return self._labels

    def label_counts(self, split: str) -> dict[str, int]:
        """Return how many rows of a split have each of the labels."""
        rows = self.targets(split)
        return {name: sum(name in row for row in rows) for name in self.labels}

    def columns(self, split: str, rows: "Dataset") -> dict[str, str | None]:
        if split == "predict":
            return {"text": self.text}
        if isinstance(self.label, str):
            return {"text": self.text, "label": self.label}
        return {"text": self.text, **{f"label.{name}": name for name in self.label}}

    def problems(self, split: str, rows: "Dataset", number: Callable[[int], int]) -> dict[int, str]:
        origin = self.origin.name(split)
        found = bad_texts(rows, origin, self.text, number)
        if split != "predict":
            known = self._labels if split == "train" else self.labels
            for i, names in enumerate(self._sets(rows)):
                wrong = self._wrong(names, known)
                if wrong:
                    place = f"in row {number(i):,} of {origin}"
                    found.setdefault(i, f"the labels {place} {wrong}; or {SKIP}.")
        return dict(sorted(found.items()))

    def keys(self, rows: "Dataset") -> list[Hashable]:
        return text_keys(rows, [self.text])

    def strata(self, split: str, rows: "Dataset") -> list[int]:
        return [0] * len(rows)

    def items(self, split: str, rows: "Dataset") -> "Dataset":
        tokens = tokenised(rows, Tokenise(self.tokenizer, self.text, None, self.max_length))
        if split == "predict":
            return tokens
        marks = [[float(name in names) for name in self.labels] for names in self._sets(rows)]
        return tokens.add_column("labels", marks)

    def collator(self) -> Callable[[Any], Any]:
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(self.tokenizer)

    def inputs(self, split: str) -> list[str]:
        return list(self.chosen(split)[self.text])

    def targets(self, split: str) -> list[list[str]]:
        return [
            [name for name in self.labels if name in names]
            for names in self._sets(self.chosen(split))
        ]

    def _sets(self, rows: "Dataset") -> list[Any]:
        """Return the labels of each row; what cannot be labels stays as it is."""
        if isinstance(self.label, tuple):
            columns = [rows[name] for name in self.label]
            return [self._marked(row) for row in zip(*columns, strict=True)]
        return [
            [part.strip() for part in value.split(self.separator) if part.strip()]
            if isinstance(value, str)
            else value
            for value in rows[self.label]
        ]

    def _marked(self, row: Sequence[Any]) -> Any:
        marks = [_MARKS.get(str(value).strip().lower()) for value in row]
        if None in marks:
            return str(row[marks.index(None)])
        return [name for name, mark in zip(self.label, marks, strict=True) if mark]

    def _wrong(self, names: Any, known: Sequence[str] | None) -> str:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            form = "a list of texts" if isinstance(self.label, str) else "0 or 1 in each column"
            return f"must be {form}, but are {names!r}"
        for name in names:
            if known is not None and name not in known:
                return f"must be among {', '.join(known)}, but hold {name!r}" + (
                    near_misses(name, known).rstrip("?")
                )
        return ""

    def _know(self, labels: Sequence[str]) -> None:
        self._labels = tuple(labels)
