"""Scores of a chat: how likely the given replies are, and how relevant and diverse one's own."""

import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_peft.tasks.squad_scores import f1, normalised_answer


class Reply(NamedTuple):
    """What a model makes of one conversation."""

    nll: float
    """Negative log-likelihood of the assistant's tokens, summed, in nats."""
    tokens: int
    """How many they are."""
    right: int
    """How many of them the model thinks the likeliest."""
    text: str | None
    """What the model says itself at the end, where it was asked."""


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

    def update(self, predictions: Sequence[Reply], targets: Sequence[str | None]) -> None:
        """Add conversations."""
        counted = [one.nll if self.score == "perplexity" else one.right for one in predictions]
        self.total += sum(counted)
        self.tokens += sum(one.tokens for one in predictions)

    def compute(self) -> Tensor:
        """Return the score, a scalar."""
        mean = self.total / self.tokens
        return mean.exp() if self.score == "perplexity" else mean


class Relevance(Metric):
    """Mean F1 of the words that a reply shares with the given one (Dinan et al. 2019, ConvAI2)."""

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    total: Tensor
    replies: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("replies", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[Reply], targets: Sequence[str | None]) -> None:
        """Add conversations; those count that the model was asked to reply to."""
        for reply, target in zip(predictions, targets, strict=True):
            if reply.text is not None and target is not None:
                self.total += f1(reply.text, [target])
                self.replies += 1

    def compute(self) -> Tensor:
        """Return the mean, between 0 and 1, a scalar."""
        return self.total / self.replies.clamp_min(1)


class Distinct(Metric):
    """The share of different pairs of words in all replies (distinct-2, Li et al. 2016).

    It is near 0 for a model that says the same whatever it is asked.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    pairs: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("pairs", default=[], dist_reduce_fx="cat")

    def update(self, predictions: Sequence[Reply], targets: Sequence[str | None]) -> None:
        """Add conversations; those count that the model was asked to reply to."""
        found = [pair for one in predictions for pair in word_pairs(one.text or "")]
        # Numbers can be gathered from other processes; two pairs share one once in 4 billion.
        numbers = [zlib.crc32(" ".join(pair).encode()) for pair in found]
        self.pairs.append(torch.tensor(numbers, dtype=torch.long, device=self.device))

    def compute(self) -> Tensor:
        """Return the share, a scalar."""
        pairs = dim_zero_cat(self.pairs)
        return pairs.new_tensor(len(pairs.unique()) / max(len(pairs), 1), dtype=torch.float)


def word_pairs(text: str) -> list[tuple[str, str]]:
    """Return the pairs of neighbouring words, without case, punctuation and articles."""
    return list(pairwise(normalised_answer(text).split()))
