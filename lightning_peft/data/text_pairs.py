"""A text and the text that is to follow from it, as the tokens that a model reads and writes."""

import dataclasses
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_peft.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""What cross-entropy leaves out: padding, and the prompt of a causal model."""

PLACE = "{source}"
"""Where a text stands in a prompt."""


@dataclasses.dataclass(frozen=True)
class TextPairs:
    """How a model reads a text and writes another.

    A causal model reads the prompt with the text in it, goes on with the target, and ends with the
    tokenizer's end token. An encoder-decoder reads the prompt in its encoder, and its decoder
    writes the target and the end token.

    Args:
        tokenizer: The model's own.
        encoder_decoder: Whether the model is an encoder-decoder.
        prompt: What is read, with `{source}` where the text stands; None is the text alone, and a
            line feed behind it for a causal model.

    Raises:
        ConfigError: The prompt has no place for the text, or the tokenizer has no end token.
    """

    tokenizer: "PreTrainedTokenizerBase"
    encoder_decoder: bool
    prompt: str | None = None

    def __post_init__(self) -> None:
        if self.prompt is not None and self.prompt.count(PLACE) != 1:
            raise ConfigError(
                f"`prompt` must hold {PLACE} once, where the text stands, but is {self.prompt!r} "
                f"instead."
            )
        if self.end is None:
            raise ConfigError(
                f"the tokenizer must have an end token, which ends what a model writes, but "
                f"{type(self.tokenizer).__name__} has none: use another model."
            )

    @property
    def end(self) -> int | None:
        """Number of the token that ends a target."""
        ends = (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id)
        return next((token for token in ends if token is not None), None)

    @property
    def padding(self) -> int:
        """Number of the token that fills rows up."""
        return int(self.tokenizer.pad_token_id or 0)

    def read(self, source: str, limit: int) -> tuple[list[int], bool]:
        """Return the tokens that the model reads, and whether the text was cut.

        Args:
            source: The text.
            limit: At most so many tokens of it are read; the prompt stays whole.
        """
        found = self._prompted(source)
        if len(found) <= limit:
            return found, False
        if len(self._bare(source)) <= limit:
            return found, False
        return self._prompted(source[: self._fitting(source, limit)]), True

    def write(self, target: str, limit: int) -> tuple[list[int], bool]:
        """Return the tokens that the model is to write, with the end, and whether it was cut."""
        # An encoder-decoder may have a vocabulary for each side, as Marian's models do.
        side = "text_target" if self.encoder_decoder else "text"
        tokens = self.tokenizer(**{side: target}, add_special_tokens=False)["input_ids"]
        return [*tokens[: limit - 1], int(self.end or 0)], len(tokens) >= limit

    def text(self, tokens: Sequence[int]) -> str:
        """Return what a model wrote, up to its end."""
        found = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return str(found).strip()

    def _fitting(self, source: str, limit: int) -> int:
        """Return how many characters of a text make `limit` tokens."""
        if self.tokenizer.is_fast:
            found = self.tokenizer(source, add_special_tokens=False, return_offsets_mapping=True)
            return int(found["offset_mapping"][limit - 1][1])
        lengths = range(len(source) + 1)
        return bisect_right(lengths, limit, key=lambda n: len(self._bare(source[:n]))) - 1

    def _bare(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens

    def _prompted(self, source: str) -> list[int]:
        prompt = self.prompt or (PLACE if self.encoder_decoder else f"{PLACE}\n")
        text = prompt.replace(PLACE, source)
        tokens: list[int] = self.tokenizer(text)["input_ids"]
        if self.encoder_decoder:
            return tokens
        bare = self._bare(text)
        # An end that the tokenizer adds would stop a causal model here.
        return tokens if tokens[-1:] == bare[-1:] else tokens[:-1]


@dataclasses.dataclass(frozen=True)
class EncodePairs:
    """Turns rows of texts into tokens.

    Args:
        pairs: How the model reads and writes.
        source: Column of the texts.
        targets: Columns of the right answers, the first of which is learned; none to predict.
        max_source: Tokens of a text at most.
        max_target: Tokens of a target at most, the end included.
    """

    pairs: TextPairs
    source: str
    targets: Sequence[str]
    max_source: int
    max_target: int

    def __call__(self, rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        read = [self.pairs.read(text, self.max_source) for text in rows[self.source]]
        columns: dict[str, list[Any]] = {"input_ids": [tokens for tokens, _ in read]}
        cut = [shortened for _, shortened in read]
        if self.targets:
            texts = rows[self.targets[0]]
            written = [self.pairs.write(text, self.max_target) for text in texts]
            columns["target"] = [tokens for tokens, _ in written]
            columns["references"] = list(
                map(list, zip(*(rows[name] for name in self.targets), strict=True))
            )
            cut = [one or other for one, (_, other) in zip(cut, written, strict=True)]
        return columns | {"cut": cut}


@dataclasses.dataclass(frozen=True)
class PairCollator:
    """Makes batches: to learn from where rows have targets, and else to be answered.

    A batch to learn from has `input_ids`, `attention_mask` and `labels`, padded on the right: for a
    causal model all `(rows, tokens)`, the target behind the prompt, of which no label is; for an
    encoder-decoder the labels are the target alone. A batch to be answered has the first two, which
    a causal model gets padded on the left, and `row_references`, the right answers, where they are
    known.
    """

    padding: int
    encoder_decoder: bool
    asks: bool = False
    """Leave the targets out, so that the model answers by itself."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if not self.asks and "target" in rows[0]:
            return self._learned(rows)
        batch: dict[str, Any] = self._read([row["input_ids"] for row in rows], self._asking_side)
        if "references" in rows[0]:
            batch["row_references"] = [row["references"] for row in rows]
        return batch

    @property
    def _asking_side(self) -> str:
        return "right" if self.encoder_decoder else "left"

    def _learned(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        if self.encoder_decoder:
            labels = [row["target"] for row in rows]
            return self._read([row["input_ids"] for row in rows]) | {
                "labels": _padded(labels, IGNORED)
            }
        whole = [[*row["input_ids"], *row["target"]] for row in rows]
        labels = [[IGNORED] * len(row["input_ids"]) + list(row["target"]) for row in rows]
        return self._read(whole) | {"labels": _padded(labels, IGNORED)}

    def _read(self, rows: list[list[int]], side: str = "right") -> dict[str, Tensor]:
        return {
            "input_ids": _padded(rows, self.padding, side),
            "attention_mask": _padded([[1] * len(row) for row in rows], 0, side),
        }


def _padded(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> Tensor:
    """Return rows of numbers as one tensor, `(rows, tokens)`."""
    return pad_sequence([torch.tensor(row) for row in rows], True, value, padding_side=side)
