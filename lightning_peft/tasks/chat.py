"""Chat: what the assistant says in a conversation, learned token by token and then generated."""

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MetricCollection

from lightning_peft.baseline import Baseline
from lightning_peft.data.chat_format import IGNORED, ChatFormat
from lightning_peft.data.conversations import Turn
from lightning_peft.errors import ConfigError
from lightning_peft.report import Example
from lightning_peft.tasks.outputs import logits_of, require_labels
from lightning_peft.tasks.packing import check_packing
from lightning_peft.tasks.replies import Reply, TokenScore, distinct, relevance
from lightning_peft.tasks.task import StepOutput, Task, model_inputs
from lightning_peft.tasks.writing import asking, written, written_baseline

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from lightning_peft.data.chat import ChatData
    from lightning_peft.models import ModelSource


class Chat(Task):
    """Learn what the assistant says, given all that was said before.

    The model takes `input_ids` and `attention_mask` or `position_ids`, all `(rows, tokens)`, and
    returns an object with `logits` of shape `(rows, tokens, vocabulary)`. The loss is the mean
    cross-entropy over the assistant's tokens of a batch. `perplexity` is the exponential of its
    mean over all of a split's, `accuracy` the share of them that the model thinks the likeliest.

    Where a split is judged its first rows are answered, too, by greedy decoding: `relevance` is the
    mean F1 of the words that an answer shares with the given one, `distinct_2` the share of
    different pairs of words in all answers, which is low for a model that says the same everywhere.

    Args:
        max_new_tokens: Tokens of an answer at most.
        samples: How many rows of a split are answered when it is judged; 0 leaves both scores out.

    Raises:
        ConfigError: A number is out of its range.
    """

    monitor = "val/perplexity"
    suffix = ".jsonl"

    def __init__(self, max_new_tokens: int = 64, samples: int = 16) -> None:
        if max_new_tokens < 1 or samples < 0:
            raise ConfigError(
                f"`max_new_tokens` must be at least 1 and `samples` 0 or more, but they are "
                f"{max_new_tokens} and {samples} instead."
            )
        self.max_new_tokens, self.samples = max_new_tokens, samples
        self._format: ChatFormat | None = None

    def equip(self, data: "ChatData", source: "ModelSource") -> None:
        """Give the data the tokenizer and the number of samples, and take the chat template."""
        data.connect(source.tokenizer())
        data.samples = self.samples
        self._format = data.format

    def load_model(self, source: "ModelSource") -> nn.Module:
        from transformers import GenerationConfig

        model = source.load("AutoModelForCausalLM")
        # Some bases come with settings for sampling, which greedy decoding would warn of.
        model.generation_config = GenerationConfig()
        return model

    def metrics(self) -> MetricCollection:
        return MetricCollection(
            {"perplexity": TokenScore("perplexity"), "accuracy": TokenScore("accuracy")},
            compute_groups=False,
        )

    def step(self, model: nn.Module, batch: Mapping[str, Any]) -> StepOutput:
        """Return the mean cross-entropy of the assistant's tokens; their numbers as targets."""
        logits, targets, _ = _said(model, batch)
        return StepOutput(cross_entropy(logits, targets), logits.argmax(-1), targets)

    def evaluate(self, model: nn.Module, batch: Mapping[str, Any]) -> StepOutput:
        """Return the loss, and how likely what the assistant says is in each row."""
        logits, targets, rows = _said(model, batch)
        losses = cross_entropy(logits, targets, reduction="none")
        count = len(batch["labels"])
        sums = torch.stack([losses.double(), torch.ones_like(losses), logits.argmax(-1) == targets])
        nll, tokens, right = sums.new_zeros(3, count).index_add(1, rows, sums).tolist()
        found = list(map(Reply, nll, map(int, tokens), map(int, right)))
        return StepOutput(losses.mean(), found, batch["labels"], len(targets))

    def predictions(self, model: nn.Module, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the answer to each row of a batch to be answered."""
        if self._format is None:
            raise ConfigError("`equip(data, source)` must be called before a model can answer.")
        found = written(
            model,
            model_inputs(batch),
            max_new_tokens=self.max_new_tokens,
            end=self._format.stops,
            padding=int(self._format.tokenizer.pad_token_id or 0),
        )
        return [{"answer": self._format.text(row)} for row in found]

    def asked(self, loader: "DataLoader[Any]") -> "tuple[DataLoader[Any], Sequence[int]]":
        """Return batches to be answered of the first rows."""
        rows: Any = loader.dataset
        numbers = range(min(self.samples, len(rows)))
        return asking(loader, numbers), numbers

    def scores(
        self, targets: Sequence[str], predictions: Sequence[Mapping[str, Any]]
    ) -> dict[str, float]:
        answers = [prediction["answer"] for prediction in predictions]
        if not answers:
            return {}
        return {"relevance": relevance(answers, targets), "distinct_2": distinct(answers)}

    def example(self, read: Sequence[Turn], target: str, prediction: Mapping[str, Any]) -> Example:
        return Example(text=read[-1]["content"], gold=target, predicted=prediction["answer"])

    def baselines(
        self,
        model: nn.Module,
        train: "DataLoader[Any]",
        validation: "DataLoader[Any]",
        test: "DataLoader[Any] | None",
    ) -> list[Baseline]:
        return [written_baseline(model, self, validation, test)]

    def check(self, model: Any, data: "ChatData") -> None:
        """Compare the tokenizer with the model, and what shares a row with what does not.

        Raises:
            ConfigError: The tokenizer has more tokens than the model knows, or conversations are to
                share rows and the model does not tell them apart.
        """
        known = model.get_input_embeddings().weight.shape[0]
        if len(data.format.tokenizer) > known:
            raise ConfigError(
                f"the tokenizer must have at most the {known:,} tokens that the model knows, but "
                f"has {len(data.format.tokenizer):,}: use the model's own."
            )
        if data.pack:
            check_packing(model, known)

    def to_spec(self) -> dict[str, Any]:
        from lightning_peft.config import target_of

        return {
            "_target_": target_of(type(self)),
            "max_new_tokens": self.max_new_tokens,
            "samples": self.samples,
        }


def _said(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits `(said, vocabulary)` of all tokens that the assistant says.

    With them come the tokens themselves and the rows that they stand in, both `(said,)`.
    """
    require_labels(batch, "messages")
    following = batch["labels"][:, 1:]  # the token that each one is to predict
    counts = following != IGNORED
    given = dict(batch) | {"use_cache": False}  # a cache would hide where conversations begin
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        places = counts.any(0).nonzero().flatten()  # logits of the others take time and memory
        given["logits_to_keep"] = places
    else:
        places = torch.arange(following.shape[1], device=following.device)
    logits = logits_of(model, given, "(rows, tokens, vocabulary)", "causal language modelling")
    counts = counts[:, places]
    rows = counts.nonzero()[:, 0]
    return logits[:, : len(places)][counts], following[:, places][counts], rows
