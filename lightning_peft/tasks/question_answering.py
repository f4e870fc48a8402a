"""Extractive question answering: where in a context the answer begins and ends."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MetricCollection

from lightning_peft.baseline import Baseline, frozen_baselines
from lightning_peft.errors import ConfigError
from lightning_peft.report import Example
from lightning_peft.tasks.answer_spans import Found, Span, best_spans
from lightning_peft.tasks.outputs import require_labels
from lightning_peft.tasks.squad_scores import SCORES, AnswerScore
from lightning_peft.tasks.task import StepOutput, Task, model_inputs

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from lightning_peft.models import ModelSource

_IGNORED = -100


class AskedData(Protocol):
    """What the task asks of a data module."""

    @property
    def unanswerable(self) -> bool:
        """Whether there are training questions without an answer."""


class QuestionAnswering(Task):
    """Find the span of a context that answers a question (Devlin et al. 2019, 4.2 and 4.3).

    The model takes `input_ids` and `attention_mask`, both `(windows, tokens)`, and returns an
    object with `start_logits` and `end_logits` of that shape. The loss is the mean cross-entropy of
    the first and of the last token of the answer, over the tokens of the context and the null token
    ([CLS]), which is the target of a window without the answer; a window that cuts the answer is
    left out. A question's answer is the span with the highest sum of both logits over all its
    windows. The metrics are exact match and F1 as SQuAD counts them, from 0 to 1.

    Args:
        unanswerable: Whether no answer is a possible answer; None takes it from the training rows.
        null_threshold: By how much the score of no answer must exceed that of the best span.
        longest: Tokens of the longest answer.
        n_best: Spans that predictions name, the best first.

    Raises:
        ConfigError: `longest` or `n_best` is less than 1.
    """

    monitor = "val/f1"
    mode = "max"
    suffix = ".jsonl"

    def __init__(
        self,
        unanswerable: bool | None = None,
        null_threshold: float = 0.0,
        longest: int = 30,
        n_best: int = 5,
    ) -> None:
        for name, value in (("longest", longest), ("n_best", n_best)):
            if value < 1:
                raise ConfigError(f"`{name}` must be at least 1, but is {value} instead.")
        self.unanswerable, self.null_threshold = unanswerable, null_threshold
        self.longest, self.n_best = longest, n_best

    def connect(self, data: AskedData) -> Self:
        """Take from the data whether questions may have no answer, unless the settings say it."""
        if self.unanswerable is None:
            self.unanswerable = data.unanswerable
        return self

    def load_model(self, source: "ModelSource") -> nn.Module:
        return source.load("AutoModelForQuestionAnswering", num_labels=2, **_renaming(source))

    def metrics(self) -> MetricCollection:
        return MetricCollection({name: AnswerScore(name) for name in SCORES})

    def step(self, model: nn.Module, batch: Mapping[str, Any]) -> StepOutput:
        """Return the mean cross-entropy, the best answer of each question, and the right ones."""
        require_labels(batch, "answers")
        logits = self._logits(model, batch)
        loss = sum(
            (_loss(one, batch, place) for place, one in enumerate(logits)),
            start=logits[0].new_zeros(()),
        )
        found = self._found(logits, batch, 1)
        contexts = batch["row_contexts"]
        texts = [self._row(one, text)["answer"] for one, text in zip(found, contexts, strict=True)]
        return StepOutput(loss / len(logits), texts, batch["row_answers"])

    def predictions(self, model: nn.Module, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return for each question its answer, and the best spans with their probabilities.

        `start` and `end` count characters of the context from 0, `end` excluded; -1 for no answer.
        A probability is that among all spans of at most `longest` tokens in all windows, and no
        answer where that is allowed.
        """
        found = self._found(self._logits(model, batch), batch, self.n_best)
        contexts = batch["row_contexts"]
        return [self._row(one, context) for one, context in zip(found, contexts, strict=True)]

    def example(
        self, read: Mapping[str, str], target: Sequence[str], prediction: Mapping[str, Any]
    ) -> Example:
        predicted = prediction["answer"]
        right = SCORES["exact_match"](predicted, target)
        shown = predicted or "-"
        gold = shown if right else next(iter(target), "-")
        return Example(text=read["question"], gold=gold, predicted=shown, score=prediction["score"])

    def by_class(
        self, targets: Sequence[Sequence[str]], predictions: Sequence[Mapping[str, Any]]
    ) -> dict[str, dict[str, float]]:
        """Return the scores of questions with and without an answer, where there are both."""
        groups: dict[str, list[tuple[str, Sequence[str]]]] = {}
        for answers, prediction in zip(targets, predictions, strict=True):
            kind = "answerable" if answers else "unanswerable"
            groups.setdefault(kind, []).append((prediction["answer"], answers))
        if len(groups) < 2:
            return {}
        return {
            kind: {name: sum(score(*one) for one in rows) / len(rows) for name, score in _SCORED}
            | {"questions": len(rows)}
            for kind, rows in sorted(groups.items())
        }

    def baselines(
        self,
        model: nn.Module,
        train: "DataLoader[Any]",
        validation: "DataLoader[Any]",
        test: "DataLoader[Any] | None",
    ) -> list[Baseline]:
        return frozen_baselines(model, self, train, validation, test, pooled=False)

    def check(self, model: nn.Module, data: AskedData) -> None:
        """Take from the data what the settings leave open; every model of the kind fits."""
        self.connect(data)

    def to_spec(self) -> dict[str, Any]:
        from lightning_peft.config import target_of

        return {
            "_target_": target_of(type(self)),
            "unanswerable": self.unanswerable,
            "null_threshold": self.null_threshold,
            "longest": self.longest,
            "n_best": self.n_best,
        }

    def _logits(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        outputs = model(**model_inputs(batch))
        start = getattr(outputs, "start_logits", None)
        end = getattr(outputs, "end_logits", None)
        if start is None or end is None:
            raise ConfigError(
                f"`model` must return `start_logits` and `end_logits`, but {type(model).__name__} "
                f"does not: use a model for question answering."
            )
        return start.float(), end.float()

    def _found(
        self, logits: tuple[Tensor, Tensor], batch: Mapping[str, Any], count: int
    ) -> list[Found]:
        start, end = (one.detach() for one in logits)
        return best_spans(start, end, batch, count, self.longest, bool(self.unanswerable))

    def _has_none(self, found: Found) -> bool:
        best = found.spans[0].score if found.spans else -math.inf
        return bool(self.unanswerable) and found.null - best > self.null_threshold

    def _row(self, found: Found, context: str) -> dict[str, Any]:
        spans = [_shown(span, context, found.evidence) for span in found.spans]
        none: dict[str, Any] = {"answer": "", "start": -1, "end": -1, "score": 0.0}
        row = {"n_best": spans}
        if self.unanswerable:
            none["score"] = math.exp(found.null - found.evidence)
            row |= {"no_answer": none["score"]}
        return (none if not spans or self._has_none(found) else spans[0]) | row


_SCORED = tuple(SCORES.items())


def _renaming(source: "ModelSource") -> dict[str, Any]:
    """Return how the weights of the base are called in a model for questions, if otherwise.

    The decoders of transformers have theirs as `transformer` there, and as `model` elsewhere.
    """
    from transformers import MODEL_FOR_QUESTION_ANSWERING_MAPPING, MODEL_MAPPING

    kind: Any = type(source.config())
    classes = (
        mapping.get(kind, None) for mapping in (MODEL_MAPPING, MODEL_FOR_QUESTION_ANSWERING_MAPPING)
    )
    base, asking = (getattr(one, "base_model_prefix", "") for one in classes)
    return {"key_mapping": {rf"^{base}\.": f"{asking}."}} if asking not in ("", base) else {}


def _loss(logits: Tensor, batch: Mapping[str, Any], place: int) -> Tensor:
    """Return the mean cross-entropy of one end of the answers, a scalar.

    Args:
        logits: `(windows, tokens)`.
        batch: Of `QuestionData`.
        place: 0 for the first token, 1 for the last.
    """
    possible = batch["row_offsets"][..., 1] > batch["row_offsets"][..., 0]  # (windows, tokens)
    possible = possible.scatter(1, batch["row_null"][:, None], True)
    targets = batch["labels"][:, place]
    masked = logits.masked_fill(~possible, -math.inf)
    total = cross_entropy(masked, targets, ignore_index=_IGNORED, reduction="sum")
    return total / (targets != _IGNORED).sum().clamp_min(1)  # 0 where every window cuts its answer


def _shown(span: Span, context: str, evidence: float) -> dict[str, Any]:
    return {
        "answer": context[span.start : span.end],
        "start": span.start,
        "end": span.end,
        "score": math.exp(span.score - evidence),
    }
