"""Sentences whose words are tagged with named entities, as batches of sub-words."""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_peft.data.bad_rows import SKIP
from lightning_peft.data.choices import Choice, Loading
from lightning_peft.data.origin import Origin
from lightning_peft.data.splits import normalised
from lightning_peft.data.tags import fault, tags_of, to_bio, types_of
from lightning_peft.data.texts import tokenised
from lightning_peft.data.tokenised import TokenisedData
from lightning_peft.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""What cross-entropy and the metrics leave out: padding, and sub-words that begin no word."""


class EntityData(TokenisedData):
    """Sentences as lists of words, with a tag for each word that says which entity it is part of.

    A row has a list of words and one of tags, as CoNLL files, JSON lines and Parquet give them; a
    text is split at white space. A sentence of more than `max_length` sub-words becomes several
    pieces in the same batch, so that every word is judged.

    Batches are dictionaries of tensors: `input_ids` and `attention_mask` of shape
    `(pieces, tokens)`; `labels` of the same shape, a tag's number at the first sub-word of each
    word and -100 elsewhere; `row_words` of the same shape, which word of the batch begins there;
    `row_lengths` `(rows,)`, how many words each row has; and `row_tags` `(rows, words)`.

    Args:
        path: One file, for `predict` the one to judge and else the one to train on; or files by
            split: train, validation, test, predict. CoNLL, JSON lines, Parquet, CSV, TSV, or for
            `predict` plain lines.
        hub: Name of a data set on the hub.
        hub_config: Its configuration, where it has several.
        source: Data that a package carries: conll2003.
        format: Format of the files (conll, jsonl, parquet, csv, tsv, txt); None takes it from each
            name.
        tokens: Column of the words.
        label: Column of the tags; not read for `predict`.
        text: Column of the texts, for `predict` where there is no column of words.
        scheme: How the tags are written: bio, iob1 or bioes.
        types: The entity types in the order of the model's outputs; None takes those of the
            training rows in ascending order.
        validation: Share of the training rows to hold out where there is no validation split.
        seed: Seed of that draw and of `limit`.
        batch_size: Rows in a batch.
        max_length: Sub-words of a piece.
        limit: At most so many rows of each split, drawn by seed; for trials.
        skip_bad_rows: Leave rows out that cannot be used, and count them.
        by_length: Train on batches of like lengths, which have little padding.
        num_workers: Processes that load batches.
        streaming: Leave the training rows on disk or the hub, and read them block by block.
    """

    asks = "the word"

    def __init__(
        self,
        *,
        path: str | Mapping[str, str] | None = None,
        hub: str | None = None,
        hub_config: str | None = None,
        source: str | None = None,
        format: str | None = None,  # noqa: A002  # the word that users know
        tokens: str = "tokens",
        label: str = "labels",
        text: str = "text",
        scheme: Literal["bio", "iob1", "bioes"] = "bio",
        types: Sequence[str] | None = None,
        validation: float = 0.1,
        seed: int = 0,
        batch_size: int = 32,
        max_length: int = 128,
        limit: int | None = None,
        skip_bad_rows: bool = False,
        by_length: bool = False,
        num_workers: int = 0,
        streaming: bool = False,
    ) -> None:
        super().__init__(
            Origin(path=path, hub=hub, hub_config=hub_config, source=source, format=format),
            Choice(validation=validation, seed=seed, limit=limit, skip_bad_rows=skip_bad_rows),
            Loading(
                batch_size=batch_size,
                num_workers=num_workers,
                by_length=by_length,
                streaming=streaming,
            ),
        )
        self.tokens, self.label, self.text, self.scheme = tokens, label, text, scheme
        self.max_length = max_length
        self._types = tuple(types) if types is not None else None

    @property
    def types(self) -> tuple[str, ...]:
        """The entity types; reads the training rows if need be."""
        if self._types is None:
            self._types = types_of(self.table("train")[self.label])
            if not self._types:
                raise DataError(
                    f"`{self.label}` must tag at least one entity, but all words of "
                    f"{self.origin.name('train')} are O: check that `label` names the right column."
                )
        return self._types

    @property
    def labels(self) -> tuple[str, ...]:
        """The tags in the order of the model's outputs: O, then B and I of each type."""
        return tags_of(self.types)

    def columns(self, split: str, rows: "Dataset") -> dict[str, str | None]:
        if split != "predict":
            return {"tokens": self.tokens, "label": self.label}
        from_texts = self.tokens not in rows.column_names and self.text in rows.column_names
        return {"text": self.text} if from_texts else {"tokens": self.tokens}

    def problems(self, split: str, rows: "Dataset", number: Callable[[int], int]) -> dict[int, str]:
        words = self._words(rows)
        found = [self._bad_words(row) for row in words]
        if split != "predict":
            # The training rows themselves say what types there are, unless a setting does.
            types = self._types if split == "train" else self.types
            for i, tags in enumerate(self._tags(rows)):
                found[i] = found[i] or self._bad_tags(words[i], tags, types)
        origin = self.origin.name(split)
        return {
            i: f"row {number(i):,} of {origin} cannot be used: {wrong}; or {SKIP}."
            for i, wrong in enumerate(found)
            if wrong
        }

    def formed(self, split: str, rows: "Dataset") -> "Dataset":
        from datasets import Dataset

        columns = {self.tokens: self._words(rows)}
        if split != "predict":
            columns[self.label] = [to_bio(tags, self.scheme) for tags in self._tags(rows)]
        return Dataset.from_dict({name: list(rows[name]) for name in rows.column_names} | columns)

    def keys(self, rows: "Dataset") -> list[Hashable]:
        return [normalised(" ".join(words)) for words in rows[self.tokens]]

    def strata(self, split: str, rows: "Dataset") -> list[int]:
        return [0] * len(rows)

    def items(self, split: str, rows: "Dataset") -> "Dataset":
        label = None if split == "predict" else self.label
        numbers = {} if split == "predict" else {tag: i for i, tag in enumerate(self.labels)}
        spaced = _keeps_spaces(self.tokenizer)
        words = TokeniseWords(self.tokenizer, self.tokens, label, numbers, self.max_length, spaced)
        return tokenised(rows, words)

    def collator(self) -> "WordCollator":
        return WordCollator(int(self.tokenizer.pad_token_id or 0), self.tokenizer.padding_side)

    def inputs(self, split: str) -> list[list[str]]:
        return list(self.chosen(split)[self.tokens])

    def targets(self, split: str) -> list[list[str]]:
        return list(self.chosen(split)[self.label])

    def _know(self, labels: Sequence[str]) -> None:
        self._types = tuple(tag[2:] for tag in labels if tag.startswith("B-"))

    def _words(self, rows: "Dataset") -> list[Any]:
        """Return the words of each row, as they are where they cannot be a list."""
        column = self.tokens if self.tokens in rows.column_names else self.text
        return [value.split() if isinstance(value, str) else value for value in rows[column]]

    def _tags(self, rows: "Dataset") -> list[Any]:
        """Return the tags of each row as texts, also where the data set numbers and names them."""
        from datasets import ClassLabel

        values = [v.split() if isinstance(v, str) else v for v in rows[self.label]]
        feature = getattr(rows.features[self.label], "feature", None)
        if isinstance(feature, ClassLabel):
            return [tags and [feature.int2str(tag) for tag in tags] for tags in values]
        return values

    def _bad_words(self, words: Any) -> str:
        if _are_texts(words):
            return ""
        return f"`{self.tokens}` must be a list of words, but is {words!r}"

    def _bad_tags(self, words: list[str], tags: Any, types: Sequence[str] | None) -> str:
        if not _are_texts(tags):
            return f"`{self.label}` must be a list of tags, but is {tags!r}"
        if len(tags) != len(words):
            return f"`{self.label}` must be {len(words)} tags, one a word, but is {len(tags)}"
        found = fault(tags, self.scheme, types)
        if found is None:
            return ""
        i, wrong = found
        remedy = ": correct it, or set `data.scheme` to how the tags are written"
        return f"the tag of word {i + 1} ({words[i]!r}) {wrong}{remedy}"


def _keeps_spaces(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether words alone become other tokens than in a text, as with byte-level tokenizers."""
    settings: dict[str, Any] = {"add_special_tokens": False}
    alone = tokenizer(["x", "x"], is_split_into_words=True, **settings)["input_ids"]
    return bool(alone != tokenizer("x x", **settings)["input_ids"])


def _are_texts(values: Any) -> bool:
    filled = isinstance(values, list) and len(values) > 0
    return filled and all(isinstance(value, str) and value.strip() for value in values)


@dataclasses.dataclass(frozen=True)
class TokeniseWords:
    """Turns rows of words into pieces of sub-words, each of at most `max_length`."""

    tokenizer: "PreTrainedTokenizerBase"
    tokens: str
    label: str | None
    numbers: Mapping[str, int]  # of the tags
    max_length: int
    spaced: bool  # whether a word comes with the space before it

    def __call__(self, rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        sentences = rows[self.tokens]
        if self.spaced:
            sentences = [[*words[:1], *(f" {word}" for word in words[1:])] for words in sentences]
        encoded = self.tokenizer(
            sentences,
            is_split_into_words=True,
            truncation=True,
            max_length=self.max_length,
            return_overflowing_tokens=True,
        )
        found: list[dict[str, Any]] = [
            {"input_ids": [], "words": [], "length": len(words)} for words in rows[self.tokens]
        ]
        for piece, row in enumerate(encoded["overflow_to_sample_mapping"]):
            found[row]["input_ids"].append(encoded["input_ids"][piece])
            found[row]["words"].append(self._begins(encoded.word_ids(piece), found[row]["words"]))
        columns = {name: [row[name] for row in found] for name in found[0]}
        if self.label is not None:
            columns["tags"] = [[self.numbers[tag] for tag in tags] for tags in rows[self.label]]
        return columns

    def _begins(self, words: list[int | None], before: list[list[int]]) -> list[int]:
        """Return which word begins at each token, -1 for none."""
        last = max((word for piece in before for word in piece), default=-1)
        found = []
        for word in words:
            new = word is not None and word > last
            found.append(word if word is not None and new else -1)
            last = max(last, found[-1])
        return found


@dataclasses.dataclass(frozen=True)
class WordCollator:
    """Makes a batch of rows, each of one or more pieces."""

    padding: int
    side: str

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        width = max(row["length"] for row in rows)
        ids = [torch.tensor(piece) for row in rows for piece in row["input_ids"]]
        words = [
            torch.tensor([word + width * i if word >= 0 else -1 for word in piece])
            for i, row in enumerate(rows)
            for piece in row["words"]
        ]
        batch = {
            "input_ids": self._pad(ids, self.padding),
            "attention_mask": self._pad([torch.ones_like(piece) for piece in ids], 0),
            "row_numbers": torch.tensor([i for i, row in enumerate(rows) for _ in row["words"]]),
            "row_words": self._pad(words, -1),
            "row_lengths": torch.tensor([row["length"] for row in rows]),
        }
        if "tags" in rows[0]:
            tags = pad_sequence([torch.tensor(row["tags"]) for row in rows], True, IGNORED)
            begun = batch["row_words"]
            labels = tags.flatten()[begun.clamp_min(0)]  # (pieces, tokens)
            batch |= {"row_tags": tags, "labels": labels.masked_fill(begun < 0, IGNORED)}
        return batch

    def _pad(self, pieces: list[Tensor], value: int) -> Tensor:
        return pad_sequence(pieces, True, value, padding_side=self.side)
