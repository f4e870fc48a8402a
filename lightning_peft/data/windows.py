"""Questions with their contexts as overlapping windows of tokens, which know their characters."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_peft.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""What cross-entropy leaves out: a window that cuts its answer."""

Offsets = list[tuple[int, int]]
_OUTSIDE = (-1, -1)  # the offsets of what is no part of the context


def check_windows(max_length: int, stride: int) -> None:
    """Check that a question and the overlap leave room for something new in each window.

    Raises:
        ConfigError: They do not.
    """
    if max_length < 32:
        raise ConfigError(f"`max_length` must be at least 32, but is {max_length} instead.")
    if not 0 <= stride <= max_length // 2:
        raise ConfigError(
            f"`stride` must be between 0 and half of `max_length` ({max_length // 2}), but is "
            f"{stride} instead."
        )


@dataclasses.dataclass(frozen=True)
class TokeniseQuestions:
    """Turns rows into windows: the question, and as much of its context as fits.

    A question is cut at a quarter of `max_length`, so that the context always goes on.
    """

    tokenizer: "PreTrainedTokenizerBase"
    question: str
    context: str
    answers: str | None
    max_length: int
    stride: int

    def __call__(self, rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        contexts = rows[self.context]
        encoded = self.tokenizer(
            self._cut([question.strip() for question in rows[self.question]]),
            contexts,
            truncation="only_second",
            max_length=self.max_length,
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
        columns: dict[str, list[Any]] = {
            name: [[] for _ in contexts] for name in (*names, "offsets", "null")
        }
        for window, row in enumerate(encoded["overflow_to_sample_mapping"]):
            for name in names:
                columns[name][row].append(encoded[name][window])
            offsets = _trimmed(
                encoded["offset_mapping"][window], encoded.sequence_ids(window), contexts[row]
            )
            columns["offsets"][row].append(offsets)
            columns["null"][row].append(self._null(encoded["input_ids"][window]))
        columns["context"] = list(contexts)
        if self.answers is not None:
            columns["answers"] = [answers["text"] for answers in rows[self.answers]]
            columns["labels"] = [
                [label(one, answers, null) for one, null in zip(windows, nulls, strict=True)]
                for windows, nulls, answers in zip(
                    columns["offsets"], columns["null"], rows[self.answers], strict=True
                )
            ]
        return columns

    def _cut(self, questions: list[str]) -> list[str]:
        encoded = self.tokenizer(
            questions,
            add_special_tokens=False,
            truncation=True,
            max_length=self.max_length // 4,
            return_offsets_mapping=True,
        )
        ends = [max((end for _, end in one), default=0) for one in encoded["offset_mapping"]]
        return [question[:end] for question, end in zip(questions, ends, strict=True)]

    def _null(self, tokens: list[int]) -> int:
        """Return where a window says that it has no answer: at its [CLS], or at its first token."""
        cls = self.tokenizer.cls_token_id
        return tokens.index(cls) if cls in tokens else 0


def label(offsets: Offsets, answers: Mapping[str, Sequence[Any]], null: int) -> tuple[int, int]:
    """Return the first and last token of an answer in a window.

    Args:
        offsets: The characters of each token, (-1, -1) outside the context.
        answers: `text` and `answer_start`; the first that stands whole in the window counts.
        null: The token that stands for no answer.

    Returns:
        `null` twice where the window has no part of any answer, `IGNORED` twice where it has no
        more than a part.
    """
    inside = [i for i, (start, end) in enumerate(offsets) if end > start >= 0]
    cut = False
    for text, begin in zip(answers["text"], answers["answer_start"], strict=True):
        end = begin + len(text)
        tokens = [i for i in inside if offsets[i][0] < end and offsets[i][1] > begin]
        if not tokens:
            continue
        before = text[: max(0, offsets[inside[0]][0] - begin)]
        after = text[max(0, offsets[inside[-1]][1] - begin) :]
        if not before.strip() and not after.strip():
            return tokens[0], tokens[-1]
        cut = True
    return (IGNORED, IGNORED) if cut else (null, null)


@dataclasses.dataclass(frozen=True)
class WindowCollator:
    """Makes a batch of questions, each of one or more windows."""

    padding: int
    type_padding: int
    side: str

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        ids = [torch.tensor(window) for row in rows for window in row["input_ids"]]
        width = max(len(window) for window in ids)
        # With padding on the left, what counts tokens from the start of a window moves.
        moved = torch.tensor([width - len(window) if self.side == "left" else 0 for window in ids])
        batch: dict[str, Any] = {
            "input_ids": self._pad(ids, self.padding),
            "attention_mask": self._pad([torch.ones_like(window) for window in ids], 0),
            "row_numbers": torch.tensor([i for i, row in enumerate(rows) for _ in row["null"]]),
            "row_offsets": self._pad(_windows(rows, "offsets"), _OUTSIDE[0]),
            "row_null": torch.stack(_windows(rows, "null")) + moved,
            "row_contexts": [row["context"] for row in rows],
        }
        if "token_type_ids" in rows[0]:
            types = _windows(rows, "token_type_ids")
            batch["token_type_ids"] = self._pad(types, self.type_padding)
        if "labels" in rows[0]:
            labels = torch.stack(_windows(rows, "labels"))  # (windows, 2)
            batch["labels"] = labels.where(labels == IGNORED, labels + moved[:, None])
            batch["row_answers"] = [row["answers"] for row in rows]
        return batch

    def _pad(self, windows: list[Tensor], value: int) -> Tensor:
        return pad_sequence(windows, True, value, padding_side=self.side)


def _windows(rows: Sequence[Mapping[str, Any]], name: str) -> list[Tensor]:
    return [torch.tensor(window) for row in rows for window in row[name]]


def _trimmed(offsets: Offsets, parts: Sequence[int | None], context: str) -> Offsets:
    """Return the characters of each token of the context without white space at its ends."""
    found = []
    for (start, end), part in zip(offsets, parts, strict=True):
        text = context[start:end]
        begin = start + len(text) - len(text.lstrip())
        found.append((begin, max(begin, start + len(text.rstrip()))) if part == 1 else _OUTSIDE)
    return found
