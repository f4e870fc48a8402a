"""Tags of words: where an entity begins (B), goes on (I), and that there is none (O)."""

from collections.abc import Iterable, Sequence

from lightning_peft.errors import near_misses

SCHEMES = ("bio", "iob1", "bioes")
OUTSIDE = "O"
_LETTERS = {"bio": "BI", "iob1": "BI", "bioes": "BIESLU"}
_AS_BIO = {"B": "B", "I": "I", "S": "B", "U": "B", "E": "I", "L": "I"}


def tags_of(types: Iterable[str]) -> tuple[str, ...]:
    """Return the tags of entity types: `O`, then `B-` and `I-` of each."""
    return (OUTSIDE, *(f"{letter}-{kind}" for kind in types for letter in "BI"))


def types_of(sentences: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """Return the entity types that occur in tags, in ascending order."""
    return tuple(sorted({tag[2:] for tags in sentences for tag in tags if tag != OUTSIDE}))


def to_bio(tags: Sequence[str], scheme: str) -> list[str]:
    """Return tags without a `fault` as BIO: every entity begins with B."""
    found = []
    for before, tag in zip([OUTSIDE, *tags], tags, strict=False):
        starts = scheme == "iob1" and (before == OUTSIDE or before[2:] != tag[2:])
        letter = "B" if starts else _AS_BIO.get(tag[0], "")
        found.append(tag if tag == OUTSIDE else f"{letter}-{tag[2:]}")
    return found


def fault(tags: Sequence[str], scheme: str, types: Sequence[str] | None) -> tuple[int, str] | None:
    """Return the first tag that cannot stand where it does: its index, and what is wrong.

    Args:
        tags: Of the words of a sentence.
        scheme: `bio` (each entity begins with B), `iob1` (B only between two entities of a type),
            or `bioes` (E and S, or L and U, where an entity ends).
        types: The entity types that there are; None takes any.
    """
    for i, tag in enumerate(tags):
        after = tags[i + 1] if i + 1 < len(tags) else OUTSIDE
        before = tags[i - 1] if i else OUTSIDE
        wrong = _unknown(tag, scheme, types) or _misplaced(before, tag, after, scheme)
        if wrong:
            return i, wrong
    return None


def _unknown(tag: str, scheme: str, types: Sequence[str] | None) -> str:
    if tag == OUTSIDE:
        return ""
    letter, dash, kind = tag[:1], tag[1:2], tag[2:]
    if letter not in _LETTERS[scheme] or dash != "-" or not kind:
        forms = ", ".join(f"{letter}-<type>" for letter in _LETTERS[scheme])
        return f"must be O or one of {forms}, but is {tag!r}"
    if types is not None and kind not in types:
        return f"must be of the types {', '.join(types)}, but is {tag!r}{_hint(kind, types)}"
    return ""


def _hint(kind: str, types: Sequence[str]) -> str:
    hint = near_misses(kind, types).strip()
    return f" ({hint[:1].lower()}{hint[1:]})" if hint else ""


def _misplaced(before: str, tag: str, after: str, scheme: str) -> str:
    """Return why a tag cannot stand between its neighbours, all of a known form."""
    inside = tag[0] in "IEL" and tag != OUTSIDE
    if scheme != "iob1" and inside and not (before[0] in "BI" and before[2:] == tag[2:]):
        return f"{tag!r} must follow B-{tag[2:]} or I-{tag[2:]}, but follows {before!r}"
    if scheme == "bioes" and tag[0] in "BI" and not (after[0] in "IEL" and after[2:] == tag[2:]):
        return f"{tag!r} must be followed by I-{tag[2:]} or E-{tag[2:]}, but is by {after!r}"
    return ""
