"""What the data modules share whose texts are cut at a length and read by a tokenizer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from lightning_peft.data.rows import RowData
from lightning_peft.data.texts import check_max_length
from lightning_peft.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenisedData(RowData):
    """Rows of texts, of each of which a model gets `max_length` tokens at once."""

    max_length: int
    asks: str | None = None
    """What the tokenizer must tell of each token: its word, its characters."""
    _tokenizer: "PreTrainedTokenizerBase | None" = None

    def connect(
        self, processor: "PreTrainedTokenizerBase", labels: Sequence[str] | None = None
    ) -> Self:
        """Take the model's tokenizer and, for a model that is already trained, its labels.

        Raises:
            ConfigError: `max_length` is more than the model can read, or the tokenizer does not
                tell what it must of each token.
        """
        check_max_length(self.max_length, processor)
        if self.asks is not None and not processor.is_fast:
            raise ConfigError(
                f"the tokenizer must be a fast one, which tells {self.asks} of each token, but "
                f"{type(processor).__name__} is none: use a model that has one."
            )
        self._tokenizer = processor
        if labels is not None:
            self._know(labels)
        self._items.clear()
        return self

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            ConfigError: There is none yet.
        """
        if self._tokenizer is None:
            raise ConfigError("`connect(tokenizer)` must be called before batches can be made.")
        return self._tokenizer

    def _know(self, labels: Sequence[str]) -> None:
        """Take the labels of a model that is already trained; rows without any have none."""
