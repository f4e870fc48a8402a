"""Answers of a causal language model, told while they come into being."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from lightning_peft.data.chat_format import ChatFormat
from lightning_peft.data.conversations import Turn
from lightning_peft.errors import ConfigError
from lightning_peft.structure.cores import core_of
from lightning_peft.tasks.writing import virtual_tokens

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a character decodes to whose last byte is to come


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How words are chosen.

    Raises:
        ConfigError: A number is out of its range.
    """

    max_new_tokens: int
    """Tokens of an answer at most."""
    temperature: float
    """0 takes the likeliest word; the higher, the freer."""
    top_p: float
    """Probability that the words have together which are chosen among."""
    repetition_penalty: float
    """Divides the logits of words that were said already; 1 leaves them."""

    def __post_init__(self) -> None:
        limits = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
        }
        for name, (fits, wanted) in limits.items():
            if not fits:
                value = getattr(self, name)
                raise ConfigError(f"`job.{name}` must be {wanted}, but is {value} instead.")

    def settings(self) -> dict[str, Any]:
        """Return them as transformers' generation takes them."""
        common = {
            "max_new_tokens": self.max_new_tokens,
            "repetition_penalty": self.repetition_penalty,
        }
        if self.temperature == 0:
            return common | {"do_sample": False}
        choice = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return common | choice | {"do_sample": True}


class Speaker:
    """A model that answers.

    Args:
        model: A causal language model of transformers.
        chat: Its tokenizer and chat template.
        sampling: How words are chosen.
    """

    def __init__(self, model: Any, chat: ChatFormat, sampling: Sampling) -> None:
        self.model, self.chat, self.sampling = model, chat, sampling
        most = getattr(model.config, "max_position_embeddings", None) or 1 << 20
        self.most = min(most, chat.tokenizer.model_max_length)
        self._room()

    def answer(self, turns: Sequence[Turn], tell: Callable[[str], None]) -> str:
        """Return the assistant's next turn; what was said until then where Ctrl-C stops it.

        Args:
            turns: The conversation so far; its oldest exchanges are left out once it is too long.
            tell: Is given each new piece of the text.
        """
        ids = torch.tensor([self.chat.prompt(turns, self._room())], device=self.model.device)
        told = Telling(self.chat, tell)
        config = GenerationConfig(
            eos_token_id=self.chat.stops,
            pad_token_id=self.chat.tokenizer.pad_token_id,
            **self.sampling.settings(),
        )
        try:
            self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                streamer=told,
            )
        except KeyboardInterrupt:
            tell(" [stopped]")
        return told.text

    def _room(self) -> int:
        """Return how many tokens of a conversation fit, beside what the active adapter adds."""
        virtual = virtual_tokens(core_of(self.model)[0].module)
        room = self.most - virtual - self.sampling.max_new_tokens
        if room < 1:
            beside = f" beside {virtual} virtual ones" if virtual else ""
            raise ConfigError(
                f"`job.max_new_tokens` must leave room in the {self.most:,} tokens that the model "
                f"can read{beside}, but is {self.sampling.max_new_tokens} instead."
            )
        return room


class Telling(BaseStreamer):
    """Passes on the text of an answer piece by piece, in whole characters.

    Args:
        chat: Turns tokens into text.
        tell: Is given each new piece.
    """

    def __init__(self, chat: ChatFormat, tell: Callable[[str], None]) -> None:
        self.text = ""
        self._chat, self._tell = chat, tell
        self._ids: list[int] | None = None  # the prompt comes first

    def put(self, value: Tensor) -> None:
        """Take the next tokens."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        text = self._chat.text(self._ids)
        if not text.endswith(_UNFINISHED):
            self._tell(text[len(self.text) :])
            self.text = text

    def end(self) -> None:
        """Do nothing: all was told."""
