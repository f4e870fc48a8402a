"""Named entities: a tag for each word, and the spans that the tags make."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities import dim_zero_cat

from lightning_peft.baseline import Baseline, frozen_baselines
from lightning_peft.data.tags import tags_of
from lightning_peft.errors import ConfigError, require
from lightning_peft.report import Example
from lightning_peft.tasks.labelled import LabelledTask
from lightning_peft.tasks.outputs import (
    check_outputs,
    load_classifier,
    logits_of,
    require_labels,
)
from lightning_peft.tasks.task import StepOutput

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from lightning_peft.models import ModelSource

_SEQEVAL = "seqeval.metrics.sequence_labeling"
_IGNORED = -100
_SCORES = ("precision", "recall", "f1")


class EntityScore(Metric):
    """Precision, recall or F1 of whole entities, over all types: type and both ends must be right.

    Args:
        tags: Their names by number.
        score: `precision`, `recall` or `f1`.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    predictions: list[Tensor]
    targets: list[Tensor]

    def __init__(self, tags: Sequence[str], score: str) -> None:
        super().__init__()
        self.tags, self.score = tuple(tags), score
        self.add_state("predictions", default=[], dist_reduce_fx="cat")
        self.add_state("targets", default=[], dist_reduce_fx="cat")

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add sentences: tags by number, both `(sentences, words)`, targets -100 at padding."""
        end = targets.new_full((len(targets), 1), _IGNORED)  # parts a sentence from the next
        padding = targets == _IGNORED
        predictions = predictions.masked_fill(padding, _IGNORED)
        self.predictions.append(torch.cat([predictions, end], 1).flatten())
        self.targets.append(torch.cat([targets, end], 1).flatten())

    def compute(self) -> Tensor:
        """Return the score, between 0 and 1, a scalar."""
        targets = _sentences(dim_zero_cat(self.targets), self.tags)
        predictions = _sentences(dim_zero_cat(self.predictions), self.tags)
        scores = entity_scores(targets, predictions)
        return torch.tensor(scores["all"][self.score], device=self.device)


class NamedEntities(LabelledTask):
    """Tag each word with the entity that it begins (B), continues (I), or with none (O).

    The model takes `input_ids` and `attention_mask`, both `(pieces, tokens)`, and returns an object
    with `logits` of shape `(pieces, tokens, tags)`. A word has the tag of its first sub-word. The
    loss is the mean cross-entropy over the words, the metrics count whole entities (seqeval).

    Args:
        labels: The tags in the order of the logits; None takes the data's by `connect`.
    """

    monitor = "val/f1"
    mode = "max"
    suffix = ".jsonl"
    setting = "types"

    def __init__(self, labels: Sequence[str] | None = None) -> None:
        if labels is not None and (len(labels) < 3 or tuple(labels) != tags_of(_types(labels))):
            raise ConfigError(
                f"`labels` must be O and B-<type>, I-<type> of each type, but is {list(labels)} "
                f"instead."
            )
        self.labels = tuple(labels) if labels is not None else None

    def equip(self, data: Any, source: "ModelSource") -> None:
        data.connect(source.tokenizer(), labels=self.labels)

    def spelled(self, labels: Sequence[str]) -> str:
        return ", ".join(_types(labels))

    def load_model(self, source: "ModelSource") -> nn.Module:
        return load_classifier(source, self.named_labels(), "AutoModelForTokenClassification")

    def metrics(self) -> MetricCollection:
        require(_SEQEVAL, "ner")  # now, and not after an epoch
        tags = self.named_labels()
        return MetricCollection({score: EntityScore(tags, score) for score in _SCORES})

    def step(self, model: nn.Module, batch: Mapping[str, Tensor]) -> StepOutput:
        """Return the mean cross-entropy of the words, and their tags, both `(rows, words)`."""
        require_labels(batch, "tags")
        logits = self._logits(model, batch)
        loss = cross_entropy(logits.transpose(1, 2), batch["labels"], ignore_index=_IGNORED)
        chosen, _ = _by_word(logits, batch)
        return StepOutput(loss, chosen, batch["row_tags"])

    def predictions(self, model: nn.Module, batch: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """Return for each row its tags, and its entities as spans of words.

        An entity's `start` is the number of its first word, from 0, `end` that after its last, and
        `score` the mean probability of its words' tags.
        """
        tags = self.named_labels()
        chosen, scores = _by_word(self._logits(model, batch), batch)
        rows = []
        for numbers, probabilities, length in zip(
            chosen.tolist(), scores.tolist(), batch["row_lengths"].tolist(), strict=True
        ):
            named = [tags[number] for number in numbers[:length]]
            entities = [
                {
                    "type": kind,
                    "start": start,
                    "end": end,
                    "score": sum(probabilities[start:end]) / (end - start),
                }
                for kind, start, end in spans(named)
            ]
            rows.append({"labels": named, "entities": entities})
        return rows

    def readable(self, read: Sequence[str], prediction: dict[str, Any]) -> dict[str, Any]:
        entities = [
            {"text": " ".join(read[one["start"] : one["end"]])} | one
            for one in prediction["entities"]
        ]
        return prediction | {"entities": entities}

    def example(
        self, read: Sequence[str], target: Sequence[str], prediction: Mapping[str, Any]
    ) -> Example | None:
        gold, predicted = _shown(read, target), _shown(read, prediction["labels"])
        if not gold and not predicted:
            return None
        return Example(text=" ".join(read), gold=gold or "-", predicted=predicted or "-")

    def by_class(
        self, targets: Sequence[Sequence[str]], predictions: Sequence[Mapping[str, Any]]
    ) -> dict[str, dict[str, float]]:
        found = entity_scores(targets, [prediction["labels"] for prediction in predictions])
        return {kind: scores for kind, scores in found.items() if kind != "all"}

    def baselines(
        self,
        model: nn.Module,
        train: "DataLoader[Any]",
        validation: "DataLoader[Any]",
        test: "DataLoader[Any] | None",
    ) -> list[Baseline]:
        return frozen_baselines(model, self, train, validation, test, pooled=False)

    def check(self, model: nn.Module, data: Any) -> None:
        """Compare the tags of the data with the head.

        Raises:
            DataError: The head has another number of tags.
        """
        self.connect(data)
        check_outputs(model, self.named_labels(), "data.types")

    def to_spec(self) -> dict[str, Any]:
        from lightning_peft.config import target_of

        labels = list(self.labels) if self.labels is not None else None
        return {"_target_": target_of(type(self)), "labels": labels}

    def _logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return logits_of(model, batch, "(pieces, tokens, tags)", "token classification")


def spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return the entities of tagged words: type, first word, and the word after the last.

    An I that follows no entity of its type begins one, as in the evaluation of CoNLL-2000.
    """
    found = require(_SEQEVAL, "ner").get_entities(list(tags))
    return [(kind, start, last + 1) for kind, start, last in found]


def entity_scores(
    targets: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]
) -> dict[str, dict[str, float]]:
    """Return precision, recall, F1 and the number of entities by type, and of `all` together.

    What is 0 divided by 0 counts as 0.
    """
    gold, found = list(map(list, targets)), list(map(list, predictions))
    kinds = sorted({kind for tags in (*gold, *found) for kind, *_ in spans(tags)})
    rows = dict.fromkeys(["all"], (0.0, 0.0, 0.0, 0))
    if kinds:
        score = require(_SEQEVAL, "ner").precision_recall_fscore_support
        by_kind = score(gold, found, average=None, zero_division=0)
        rows = dict(zip(kinds, zip(*by_kind, strict=True), strict=True))
        rows["all"] = score(gold, found, average="micro", zero_division=0)
    return {
        kind: dict(zip(_SCORES, map(float, row[:3]), strict=True)) | {"entities": int(row[3])}
        for kind, row in rows.items()
    }


def _types(tags: Sequence[str]) -> list[str]:
    return [tag.removeprefix("B-") for tag in tags[1::2]]


def _by_word(logits: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return each word's tag and its probability, both `(rows, words)`.

    A word of which the tokenizer left nothing is no entity.
    """
    probabilities, tags = logits.softmax(-1).max(-1)  # (pieces, tokens)
    lengths = batch["row_lengths"]
    shape = len(lengths), int(lengths.max())
    begins = batch["row_words"] >= 0
    places = batch["row_words"][begins]
    chosen = tags.new_zeros(shape).flatten().index_put((places,), tags[begins])
    scores = probabilities.new_ones(shape).flatten().index_put((places,), probabilities[begins])
    return chosen.view(shape), scores.view(shape)


def _sentences(numbers: Tensor, tags: Sequence[str]) -> list[list[str]]:
    """Return the tags of each sentence from their numbers, one after another, parted by -100."""
    found: list[list[str]] = [[]]
    for number in numbers.tolist():
        if number != _IGNORED:
            found[-1].append(tags[number])
        elif found[-1]:
            found.append([])
    return found[:-1] if not found[-1] else found


def _shown(words: Sequence[str], tags: Sequence[str]) -> str:
    """Return the entities as a person writes them: `Paris [location]; Ada [person]`."""
    return "; ".join(f"{' '.join(words[i:j])} [{kind}]" for kind, i, j in spans(tags))
