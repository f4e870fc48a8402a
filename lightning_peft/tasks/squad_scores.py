"""Scores of answers as SQuAD counts them: exact match and F1 of words."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised_answer(text: str) -> str:
    """Return an answer as it is compared: lower case, no punctuation, no English articles."""
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 where the prediction is one of the answers, else 0.

    No answers, like answers of which nothing is left, ask for an empty prediction.
    """
    return float(normalised_answer(prediction) in _wanted(answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Return the F1 of the words that a prediction shares with the answer that it is most like."""
    found = normalised_answer(prediction).split()
    return max(_word_f1(found, answer.split()) for answer in _wanted(answers))


SCORES: dict[str, Callable[[str, Sequence[str]], float]] = {"exact_match": exact_match, "f1": f1}
"""The scores of one question, each between 0 and 1."""


class AnswerScore(Metric):
    """The mean score over questions (Rajpurkar et al. 2016, 2018), from 0 to 1.

    Args:
        score: `exact_match` or `f1`.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, score: str) -> None:
        super().__init__()
        self.score = score
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> None:
        """Add questions: the predicted text of each, empty for none, and the right ones."""
        pairs = zip(predictions, targets, strict=True)
        self.total += sum(SCORES[self.score](text, answers) for text, answers in pairs)
        self.count += len(predictions)

    def compute(self) -> Tensor:
        """Return the mean, a scalar."""
        return self.total / self.count


def _wanted(answers: Sequence[str]) -> list[str]:
    return [text for text in map(normalised_answer, answers) if text] or [""]


def _word_f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    shared = (Counter(found) & Counter(wanted)).total()
    return 2 * shared / (len(found) + len(wanted))
