"""What the data modules on texts share: from texts to token numbers."""

import dataclasses
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_peft.data.sources import hidden_progress
from lightning_peft.data.splits import normalised
from lightning_peft.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_SLOW = 20_000  # rows from which on tokenisation shows its progress


@dataclasses.dataclass(frozen=True)
class Tokenise:
    """Turns rows into token numbers, cut at `max_length` and not yet padded."""

    tokenizer: "PreTrainedTokenizerBase"
    text: str
    text_pair: str | None
    max_length: int

    def __call__(self, rows: Mapping[str, list[Any]]) -> dict[str, Any]:
        pairs = rows[self.text_pair] if self.text_pair is not None else None
        encoded = self.tokenizer(
            rows[self.text], pairs, truncation=True, max_length=self.max_length
        )
        return dict(encoded)


def tokenised(rows: "Dataset", tokenise: Callable[[Any], dict[str, Any]]) -> "Dataset":
    """Return what `tokenise` makes of batches of rows, with progress where that takes a while."""
    with hidden_progress(len(rows) < _SLOW or not sys.stderr.isatty()):
        return rows.map(
            tokenise, batched=True, remove_columns=rows.column_names, desc="Reading texts"
        )


def check_max_length(max_length: int, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Compare the length at which texts are cut with what the model can read.

    Raises:
        ConfigError: It is more.
    """
    if max_length > tokenizer.model_max_length:
        raise ConfigError(
            f"`max_length` must be at most {tokenizer.model_max_length}, which is what the "
            f"model can read, but is {max_length} instead."
        )


def text_keys(rows: "Dataset", columns: Sequence[str]) -> list[Hashable]:
    """Return the texts of each row as duplicates are compared: case and spaces aside."""
    texts = [map(normalised, rows[column][:]) for column in columns]
    return list(zip(*texts, strict=True))
