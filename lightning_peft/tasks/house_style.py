"""The style of a house in features that can be counted, and how well it is kept.

They are surface habits of English summaries, found by words alone: no model judges them, so they
say how texts are written and not whether what they say is true.
"""

import re
from collections.abc import Sequence

_PERSONAL = re.compile(r"\b(i|me|my|mine|we|us|our|ours|you|your|yours)\b", re.IGNORECASE)
_PAST = re.compile(
    r"\b(was|were|had|did|said|told|went|came|gave|took|made|got|thought|knew|felt|[a-z]{3,}ed)\b",
    re.IGNORECASE,
)
_NAME = re.compile(r"(?:(?:Mr|Mrs|Ms|Dr)\.? )?(?:#\w+#|[A-Z]\w*)")
_OPENINGS = re.compile(
    r"(?:an?|th(?:e|is|at|ese|ose|ey|eir|en)|t?here|it|s?he|we|you|his|her|my|our|your|i[nf]?|on|at"
    r"|to|for|from|with|by|of|as|when|while|after|before|during|because|although|and|but|or|so|both"
    r"|one|two|summary|dialogue|conversation|person|speaker)",
    re.IGNORECASE,
)
"""First words that are capitalised and yet no names."""
_HABITS = ("one_paragraph", "begins_with_name", "third_person", "present_tense", "full_stop")


def habits(texts: Sequence[str]) -> dict[str, float]:
    """Return the habits of texts: mean numbers of words and sentences, and shares of texts.

    A text is `one_paragraph` without a line break; it `begins_with_name` if its first word is
    capitalised (or a speaker such as `#Person1#`) and none of the usual openings; `third_person`
    without I, we, you and their forms; `present_tense` without common past forms or words in -ed;
    and has a `full_stop` if it ends with a sentence's end.

    Args:
        texts: At least one.
    """
    found = [_habits_of(text.strip()) for text in texts]
    return {name: sum(one[name] for one in found) / len(found) for name in found[0]}


def agreement(written: dict[str, float], wanted: dict[str, float]) -> float:
    """Return how near two houses are, from 0 to 1, which is alike in every habit.

    The mean over the yes-or-no habits of 1 less the difference of their shares, and over the number
    of words of the smaller divided by the greater.
    """
    near = [1 - abs(written[name] - wanted[name]) for name in _HABITS]
    shorter, longer = sorted((written["words"], wanted["words"]))
    return (sum(near) + (shorter / longer if longer else 1.0)) / (len(near) + 1)


def _habits_of(text: str) -> dict[str, float]:
    name = _NAME.match(text)
    return {
        "words": len(text.split()),
        "sentences": len(re.findall(r"[.!?]+(?=\s|$)", text)),
        "one_paragraph": bool(text) and "\n" not in text,
        "begins_with_name": name is not None and not _OPENINGS.fullmatch(name.group()),
        "third_person": bool(text) and not _PERSONAL.search(text),
        "present_tense": bool(text) and not _PAST.search(text),
        "full_stop": text.endswith((".", "!", "?")),
    }
