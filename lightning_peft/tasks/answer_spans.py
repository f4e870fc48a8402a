"""The best spans of a context, from the scores of where an answer begins and ends."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Span(NamedTuple):
    """Characters of a context, the end excluded."""

    start: int
    end: int
    score: float
    """The sum of the two logits."""


class Found(NamedTuple):
    """What the model makes of one question."""

    spans: list[Span]
    """The best first; none where no window has any token of the context."""
    null: float
    """The score of no answer: the lowest of all windows, as each can only speak for itself."""
    evidence: float
    """The log of the sum of exp(score) over no answer, if allowed, and all spans of all windows."""


def best_spans(
    start: Tensor, end: Tensor, batch: Mapping[str, Any], count: int, longest: int, null: bool
) -> list[Found]:
    """Return the best spans of each question over all its windows.

    Args:
        start: Logits of the first token, `(windows, tokens)`.
        end: Logits of the last token, `(windows, tokens)`.
        batch: Of `QuestionData`: `row_offsets`, `row_null`, `row_numbers` and `row_contexts`.
        count: At most so many spans of each question.
        longest: Tokens of the longest span.
        null: Whether no answer is one of the possible answers.
    """
    offsets = batch["row_offsets"]
    scores = span_scores(start, end, offsets[..., 1] > offsets[..., 0], longest).flatten(1)
    values, places = scores.topk(min(count, scores.shape[1]), dim=1)  # (windows, count)
    first = places // longest
    last = (first + places % longest).clamp_max(offsets.shape[1] - 1)
    characters = torch.stack(
        [offsets[..., 0].gather(1, first), offsets[..., 1].gather(1, last)], dim=-1
    )
    nulls = (start + end).gather(1, batch["row_null"][:, None]).squeeze(1)  # (windows,)
    questions = [_Windows() for _ in batch["row_contexts"]]
    columns = batch["row_numbers"], values, characters, nulls, scores.logsumexp(1)
    for number, *window in zip(*(column.tolist() for column in columns), strict=True):
        questions[number].add(*window)
    return [question.found(count, null) for question in questions]


def span_scores(start: Tensor, end: Tensor, inside: Tensor, longest: int) -> Tensor:
    """Return the score of each span of at most `longest` tokens, -inf where it is none.

    Args:
        start: Logits of the first token, `(windows, tokens)`.
        end: Logits of the last token, `(windows, tokens)`.
        inside: Which tokens are of the context, `(windows, tokens)`.
        longest: Tokens of the longest span.

    Returns:
        `(windows, tokens, longest)`: at `[w, i, k]` that of the span of tokens `i` to `i + k`.
    """
    start, end = (logits.masked_fill(~inside, float("-inf")) for logits in (start, end))
    ends = pad(end, (0, longest - 1), value=float("-inf")).unfold(1, longest, 1)
    return start.unsqueeze(-1) + ends


class _Windows:
    """What the windows of one question say."""

    def __init__(self) -> None:
        self._spans: dict[tuple[int, int], float] = {}
        self._nulls: list[float] = []
        self._evidence: list[float] = []

    def add(
        self,
        scores: list[float],
        characters: list[tuple[int, int]],
        null: float,
        evidence: float,
    ) -> None:
        for score, (start, end) in zip(scores, characters, strict=True):
            if score > self._spans.get((start, end), float("-inf")):
                self._spans[start, end] = score
        self._nulls.append(null)
        self._evidence.append(evidence)

    def found(self, count: int, null: bool) -> Found:
        spans = [Span(*characters, score) for characters, score in self._spans.items()]
        spans.sort(key=lambda span: span.score, reverse=True)
        lowest = min(self._nulls)
        evidence = [*self._evidence, lowest] if null else self._evidence
        total = float(torch.tensor(evidence, dtype=torch.float64).logsumexp(0))
        return Found(spans[:count], lowest, total)
