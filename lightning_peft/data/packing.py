"""Several conversations in one row, and conversations that are too long for one."""

from collections.abc import Sequence
from itertools import pairwise

from lightning_peft.data.chat_format import IGNORED, Encoded


def cut(whole: Encoded, max_length: int) -> Encoded:
    """Return the turns of a conversation that fit, at least a part of the first answer.

    What follows the last answer that fits is left out, since nothing is learned from it. Where not
    even the first answer fits, it keeps half of the room or more, and the end of what was asked
    fills the rest.
    """
    starts, ends = _answers(whole.labels)
    fitting = [end for end in ends if end <= max_length]
    if fitting:
        return Encoded(whole.ids[: fitting[-1]], whole.labels[: fitting[-1]])
    start, end = starts[0], ends[0]
    end = start + min(end - start, max(max_length // 2, max_length - start))
    return Encoded(whole.ids[:end][-max_length:], whole.labels[:end][-max_length:])


def packed(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Return which conversations share a row: each goes where it fits best, the longest first.

    Args:
        lengths: The tokens of each, none of them above `room`.
        room: The tokens of a row.

    Returns:
        The numbers of the conversations of each row, ascending within a row.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # rows by the room that is left
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        left = next((r for r in range(lengths[i], room + 1) if by_room.get(r)), None)
        if left is None:
            rows.append([])
            left, row = room, len(rows) - 1
        else:
            row = by_room[left].pop()
        rows[row].append(i)
        by_room.setdefault(left - lengths[i], []).append(row)
    return [sorted(row) for row in rows]


def _answers(labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return where the answers begin, and where they end (exclusive)."""
    said = [False, *(label != IGNORED for label in labels), False]
    changes = [i for i, (before, now) in enumerate(pairwise(said)) if before != now]
    return changes[::2], changes[1::2]
