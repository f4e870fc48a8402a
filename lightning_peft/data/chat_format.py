"""How a conversation becomes tokens: the chat template, and which tokens the assistant speaks."""

import re
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from lightning_peft.data.conversations import Turn
from lightning_peft.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of what the assistant does not say."""

_FIRST = 8
"""Turns that are rendered at first where not all need be; each try takes twice as many."""

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PLAIN = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'].capitalize() + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)


class Encoded(NamedTuple):
    """The tokens of a conversation."""

    ids: list[int]
    labels: list[int]
    """The same numbers where the assistant speaks, its end of turn included, and else -100."""


class ChatFormat:
    """A tokenizer with its chat template, or with a plain one where it has none.

    What the assistant says begins where the prompt for its turn ends, and ends with its turn. Both
    follow from the template itself, which is rendered up to there; a template that marks it by
    `{% generation %}` is taken at its word.

    Args:
        tokenizer: A fast one, which tells where in the text a token stands.
        template: A Jinja template to use instead of the tokenizer's.

    Raises:
        ConfigError: The tokenizer is not a fast one, or has no token that ends a text.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: str | None = None) -> None:
        if not tokenizer.is_fast or tokenizer.eos_token is None:
            raise ConfigError(
                f"the tokenizer must be a fast one with a token that ends a text, but "
                f"{type(tokenizer).__name__} is not: use a model that has one."
            )
        self.tokenizer = tokenizer
        own = tokenizer.chat_template
        self.template: str = template or (own if isinstance(own, str) else _plain(tokenizer))
        self._marked = _MARKED.search(self.template) is not None
        added = tokenizer.added_tokens_decoder.items()
        self._special = {i: token.content for i, token in added if token.special}

    @cached_property
    def stops(self) -> list[int]:
        """The tokens that end an answer: the tokenizer's end, and that of the template's turns."""
        said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        ids = [label for label in self.encode(said).labels if label != IGNORED]
        ends = [i for i in ids[-1:] if i in self._special]
        return list(dict.fromkeys([int(self.tokenizer.eos_token_id), *ends]))

    def encode(self, turns: Sequence[Turn], enough: int | None = None) -> Encoded:
        """Return the tokens of a conversation, and which of them the assistant says.

        Args:
            turns: With one of the assistant among them.
            enough: Leave later turns out once there are more tokens; None takes all.

        Raises:
            ConfigError: The template writes earlier turns anew when later ones come.
            DataError: The template refuses the conversation, or shows nothing of the assistant.
        """
        encode = self._encode_marked if self._marked else self._encode
        first = len(turns) if enough is None else _FIRST
        encoded = encode(turns[:first])
        while first < len(turns) and len(encoded.ids) <= (enough or 0):
            first *= 2
            encoded = encode(turns[:first])
        if all(label == IGNORED for label in encoded.labels):
            raise DataError(
                f"the chat template must leave something for the assistant to say, but does not in "
                f"the conversation that begins with {turns[0]['content'][:40]!r}: give one that "
                "does as `data.chat_template=<file>`."
            )
        return encoded

    def prompt(self, turns: Sequence[Turn], max_length: int) -> list[int]:
        """Return the tokens that ask for the assistant's next turn.

        Where they are too many, the oldest exchanges are left out, then the beginning of the text.
        """
        first = 1 if turns[0]["role"] == "system" else 0
        kept = list(turns)
        ids = self._prompt(kept)
        while len(ids) > max_length and len(kept) > first + 2:
            del kept[first : first + 2]
            ids = self._prompt(kept)
        return ids[-max_length:]

    def text(self, ids: Sequence[int]) -> str:
        """Return an answer's text, without what ends it."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def _encode(self, turns: Sequence[Turn]) -> Encoded:
        text = self._rendered(turns, answer=False)
        spans = [
            self._span(turns, i, text)
            for i, turn in enumerate(turns)
            if turn["role"] == "assistant"
        ]
        found = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        said = [
            any(start < to and at < end for start, end in spans)
            for at, to in found["offset_mapping"]
        ]
        return _encoded(found["input_ids"], said)

    def _prompt(self, turns: Sequence[Turn]) -> list[int]:
        text = self._rendered(turns, answer=True)
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _rendered(self, turns: Sequence[Turn], answer: bool) -> str:
        return str(self._apply(turns, tokenize=False, add_generation_prompt=answer))

    def _encode_marked(self, turns: Sequence[Turn]) -> Encoded:
        found = self._apply(
            turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return _encoded(found["input_ids"], found["assistant_masks"])

    def _apply(self, turns: Sequence[Turn], **settings: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                list(turns), chat_template=self.template, **settings
            )
        except TemplateError as error:
            raise DataError(
                f"the chat template refuses the conversation that begins with "
                f"{turns[0]['content'][:40]!r}: {error}."
            ) from error

    def _span(self, turns: Sequence[Turn], i: int, text: str) -> tuple[int, int]:
        """Return where in the text the assistant's turn `i` begins and ends."""
        before = self._rendered(turns[:i], answer=True)
        until = self._rendered(turns[: i + 1], answer=False)
        if not (text.startswith(until) and until.startswith(before)):
            raise ConfigError(
                "the chat template must leave earlier turns as they were when later ones come, or "
                "mark what the assistant says by `{% generation %}`, but does neither: give one "
                "that does as `data.chat_template=<file>`."
            )
        # White space behind the token that ends the turn is the template's, and never generated.
        bare = until.rstrip()
        ends = bare.endswith(tuple(self._special.values()))
        return len(before), max(len(bare) if ends else len(until), len(before))


def _encoded(ids: Sequence[int], said: Sequence[Any]) -> Encoded:
    labels = [i if spoken else IGNORED for i, spoken in zip(ids, said, strict=True)]
    return Encoded(list(ids), labels)


def _plain(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a template for a tokenizer that has none, beginning as its texts begin."""
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return ("{{ bos_token }}" if begins else "") + _PLAIN
