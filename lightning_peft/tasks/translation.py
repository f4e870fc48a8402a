"""Machine translation: a sentence in one language, written in another."""

from collections.abc import Mapping, Sequence
from typing import Any

from torchmetrics import MetricCollection

from lightning_peft.errors import require
from lightning_peft.tasks.generation import TextGeneration


class Translation(TextGeneration):
    """Translate texts; what is generated is scored by BLEU and chrF over all rows together.

    Both are sacrebleu's with its own settings, between 0 and 100: BLEU (Papineni et al. 2002) of
    words, mixed case, `13a` tokenisation and exponential smoothing; chrF (Popović 2015) of runs of
    1 to 6 characters. Where a row has several references, all of them count.
    """

    headline = "bleu"

    def metrics(self) -> MetricCollection:
        require("sacrebleu", "translation")  # now, and not after a fit
        return super().metrics()

    def scores(
        self, targets: Sequence[Sequence[str]], predictions: Sequence[Mapping[str, Any]]
    ) -> dict[str, float]:
        sacrebleu = require("sacrebleu", "translation")
        written = [one["text"] for one in predictions]
        most = max(map(len, targets))
        # sacrebleu takes the first references of all rows, then the second, and None for none.
        references = [
            [right[i] if i < len(right) else None for right in targets] for i in range(most)
        ]
        return {
            "bleu": float(sacrebleu.corpus_bleu(written, references).score),
            "chrf": float(sacrebleu.corpus_chrf(written, references).score),
        }
