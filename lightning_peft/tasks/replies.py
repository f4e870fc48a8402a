"""Scores of a chat: how likely the given replies are, and how relevant and diverse one's own."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_peft.tasks.squad_scores import f1, normalised_answer


class Reply(NamedTuple):
    """What a model makes of one conversation."""

    nll: float
    """Negative log-likelihood of the assistant's tokens, summed, in nats."""
    tokens: int
    """How many they are."""
    right: int
    """How many of them the model thinks the likeliest."""


class TokenScore(Metric):
    """How well the assistant's tokens are predicted, each counting the same over a whole split.

    Args:
        score: `perplexity`, the exponential of the mean negative log-likelihood, or `accuracy`, the
            share of tokens that are the likeliest.
    """

    is_differentiable = False
    full_state_update = False
    total: Tensor
    tokens: Tensor

    def __init__(self, score: Literal["perplexity", "accuracy"]) -> None:
        super().__init__()
        self.score = score
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("tokens", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[Reply], targets: Tensor) -> None:
        """Add conversations."""
        counted = [one.nll if self.score == "perplexity" else one.right for one in predictions]
        self.total += sum(counted)
        self.tokens += sum(one.tokens for one in predictions)

    def compute(self) -> Tensor:
        """Return the score, a scalar."""
        mean = self.total / self.tokens
        return mean.exp() if self.score == "perplexity" else mean


def relevance(replies: Sequence[str], given: Sequence[str]) -> float:
    """Return the mean F1 of the words that a reply shares with the given one, between 0 and 1.

    So it is measured in ConvAI2 (Dinan et al. 2019).
    """
    shared = [f1(reply, [right]) for reply, right in zip(replies, given, strict=True)]
    return sum(shared) / len(shared)


def distinct(replies: Sequence[str]) -> float:
    """Return the share of different pairs of words in all replies (distinct-2, Li et al. 2016).

    It is near 0 for a model that says the same whatever it is asked.
    """
    pairs = [pair for reply in replies for pair in word_pairs(reply)]
    return len(set(pairs)) / max(len(pairs), 1)


def word_pairs(text: str) -> list[tuple[str, str]]:
    """Return the pairs of neighbouring words, without case, punctuation and articles."""
    return list(pairwise(normalised_answer(text).split()))
