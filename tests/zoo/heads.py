"""Which model classes of transformers there are for each task head."""

from functools import cache

HEADS = {
    "sequence classification": "SEQUENCE_CLASSIFICATION",
    "causal LM": "CAUSAL_LM",
    "seq2seq": "SEQ_TO_SEQ_CAUSAL_LM",
    "token classification": "TOKEN_CLASSIFICATION",
    "question answering": "QUESTION_ANSWERING",
    "image classification": "IMAGE_CLASSIFICATION",
}
"""Each head, and how transformers' auto classes spell it."""


@cache
def architectures(head: str) -> tuple[str, ...]:
    """Return the names of the model classes with this head, each once, in alphabetical order."""
    from transformers.models.auto import modeling_auto

    mapping = getattr(modeling_auto, f"MODEL_FOR_{HEADS[head]}_MAPPING_NAMES")
    classes: set[str] = set()
    for names in mapping.values():
        classes.update([names] if isinstance(names, str) else names)
    return tuple(sorted(classes))


def cells(head: str | None = None) -> list[tuple[str, str]]:
    """Return (head, class name) of every architecture, or of one head's."""
    return [(h, name) for h in HEADS if head in (None, h) for name in architectures(h)]
