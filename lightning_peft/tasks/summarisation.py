"""Summarisation: what a long text says, in few words and in the style of the house."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torchmetrics import MetricCollection

from lightning_peft.errors import require
from lightning_peft.tasks.generation import TextGeneration
from lightning_peft.tasks.house_style import agreement, habits

_SCORER = "rouge_score.rouge_scorer"
_STEMMER = "nltk.stem.porter"
_KINDS = ("rouge1", "rouge2", "rougeL")
_STEMMED = 4  # letters of a word that has a stem, as in Google's implementation


class Summarisation(TextGeneration):
    """Summarise texts; what is generated is scored by ROUGE and by the style of the references.

    `rouge1`, `rouge2` and `rougeL` (Lin 2004) are mean F-measures between 0 and 1, of single words,
    pairs, and the longest common subsequence, by Google's `rouge_score` with Porter stems; of
    several references the best one counts. `style` says how near the generated texts come to the
    references in their habits (see `house_style`), and `words` is their mean length.
    """

    headline = "rougeL"

    def metrics(self) -> MetricCollection:
        require(_SCORER, "summarisation")  # now, and not after a fit
        return super().metrics()

    def scores(
        self, targets: Sequence[Sequence[str]], predictions: Sequence[Mapping[str, Any]]
    ) -> dict[str, float]:
        scorer = require(_SCORER, "summarisation").RougeScorer(_KINDS, tokenizer=_Words())
        written = [one["text"] for one in predictions]
        found = [
            scorer.score_multi(list(right), text)
            for right, text in zip(targets, written, strict=True)
        ]
        rouge = {kind: sum(one[kind].fmeasure for one in found) / len(found) for kind in _KINDS}
        generated, given = self._habits(targets, predictions)
        return rouge | {"style": agreement(generated, given), "words": generated["words"]}

    def by_class(
        self, targets: Sequence[Sequence[str]], predictions: Sequence[Mapping[str, Any]]
    ) -> dict[str, dict[str, float]]:
        """Return the habits of the references and of what was generated."""
        generated, given = self._habits(targets, predictions)
        return {"references": given, "generated": generated}

    def _habits(
        self, targets: Sequence[Sequence[str]], predictions: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, float], dict[str, float]]:
        generated = habits([one["text"] for one in predictions])
        return generated, habits([text for right in targets for text in right])


class _Words:
    """Splits texts as `rouge_score` does, but keeps the letters of all languages."""

    def __init__(self) -> None:
        self._stem = require(_STEMMER, "summarisation").PorterStemmer().stem

    def tokenize(self, text: str) -> list[str]:
        words = re.findall(r"[^\W_]+", text.lower())
        return [self._stem(word) if len(word) >= _STEMMED else word for word in words]
