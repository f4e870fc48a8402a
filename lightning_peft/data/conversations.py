"""Conversations: the turns of a system, a user and an assistant, however a file writes them."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_peft.errors import near_misses

ROLES = ("system", "user", "assistant")
"""Who speaks."""

Turn = dict[str, str]
"""One message: its `role` and its `content`."""

_NAMES = {role: role for role in ROLES} | {"human": "user", "gpt": "assistant"}
_KEYS = (("role", "content"), ("from", "value"))  # the hub's habit, and ShareGPT's


def turns_of(messages: Any) -> Any:
    """Return messages as turns; as they are where they are none.

    A message says who speaks by `role` and what by `content`, or by `from` and `value` as in
    ShareGPT, where `human` is the user and `gpt` the assistant.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        return messages
    return [_turn(message) for message in messages]


def fault(turns: Any, answered: bool) -> str:
    """Return what is wrong with a conversation; empty for nothing.

    It is one system turn or none, then user and assistant by turns, the user first.

    Args:
        turns: As `turns_of` gives them.
        answered: Whether an assistant's turn must be among them.
    """
    if not isinstance(turns, list) or not turns:
        return f"`messages` must be a list of messages, but is {_shown(turns)}"
    for number, turn in enumerate(turns, 1):
        wrong = _wrong_turn(turn, turns[number - 2]["role"] if number > 1 else "")
        if wrong:
            return f"message {number} {wrong}"
    spoken = [turn["role"] for turn in turns]
    if "user" not in spoken:
        return "there must be a user's message, but there is none"
    if answered and "assistant" not in spoken:
        return "there must be an assistant's message to learn from, but there is none"
    return ""


def asked(turns: Sequence[Turn], answered: bool) -> list[Turn]:
    """Return a conversation up to its last question.

    Args:
        turns: The whole conversation.
        answered: Whether it must be one that the assistant answers.
    """
    until = len(turns)
    if answered:
        until = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
    last = max(i for i, turn in enumerate(turns[:until]) if turn["role"] == "user")
    return list(turns[: last + 1])


def unanswered(turns: Any) -> Any:
    """Return a conversation without an answer at its end, be it empty; as it is if it is none."""
    last = turns[-1] if isinstance(turns, list) and turns else None
    answered = isinstance(last, Mapping) and last.get("role") == "assistant"
    return turns[:-1] if answered else turns


def _turn(message: Any) -> Any:
    if not isinstance(message, Mapping):
        return message
    for who, what in _KEYS:
        if message.get(who) is not None or message.get(what) is not None:
            role = message.get(who)
            return {"role": _NAMES.get(str(role), role), "content": message.get(what)}
    return dict(message)


def _wrong_turn(turn: Any, before: str) -> str:
    if not isinstance(turn, Mapping) or not {"role", "content"} <= turn.keys():
        return f"must have `role` and `content` (or `from` and `value`), but is {_shown(turn)}"
    role, content = turn["role"], turn["content"]
    if role not in ROLES:
        known = ", ".join(_NAMES)
        return f"must be of {known}, but is of {role!r}{near_misses(str(role), _NAMES)}"
    if not isinstance(content, str):
        return f"must have a text as content, but has {_shown(content)}"
    if not content.strip():
        return "must have a text as content, but is empty"
    allowed = {"": ("system", "user"), "system": ("user",), "user": ("assistant",)}
    if role not in allowed.get(before, ("user",)):
        after = f"after {before}" if before else "at the start"
        return f"must be of {' or '.join(allowed.get(before, ('user',)))} {after}, but is of {role}"
    return ""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
