"""What translation and summarisation share: learn to write texts, and write them."""

import abc
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchmetrics import Metric, MetricCollection

from lightning_peft.baseline import Baseline
from lightning_peft.data.generation import GenerationData
from lightning_peft.data.splits import sample
from lightning_peft.data.text_pairs import IGNORED, TextPairs
from lightning_peft.errors import ConfigError
from lightning_peft.report import Example
from lightning_peft.tasks.outputs import logits_of, require_labels
from lightning_peft.tasks.task import StepOutput, Task, model_inputs
from lightning_peft.tasks.writing import asking, written, written_baseline

if TYPE_CHECKING:
    from lightning_peft.models import ModelSource


class TokenAccuracy(Metric):
    """Share of target tokens that the model thinks the likeliest after the right ones before."""

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    right: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("tokens", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add tokens by number, both `(rows, tokens)`; targets of -100 do not count."""
        counts = targets != IGNORED
        self.right += (predictions == targets)[counts].sum()
        self.tokens += counts.sum()

    def compute(self) -> Tensor:
        """Return the share, a scalar."""
        return self.right / self.tokens


class TextGeneration(Task):
    """Write a text for each text; a task says by `scores` what such a text is worth.

    The model is causal or an encoder-decoder of transformers and reads batches of `PairCollator`.
    The loss is the mean cross-entropy over the target tokens of a batch, each predicted after the
    right ones before it, which is all that a validation within a fit computes. Where a split is
    judged, texts are generated too, for a sample of its rows, and scored.

    Args:
        max_new_tokens: Tokens of a generated text at most.
        beams: Width of the beam search; 1 decodes greedily.
        samples: So many rows of a split are generated for when it is judged; None takes all.

    Raises:
        ConfigError: A number is below 1.
    """

    monitor = "val/loss"
    suffix = ".jsonl"

    def __init__(self, max_new_tokens: int = 64, beams: int = 1, samples: int | None = 64) -> None:
        settings = {"max_new_tokens": max_new_tokens, "beams": beams, "samples": samples}
        for name, value in settings.items():
            if value is not None and value < 1:
                raise ConfigError(f"`{name}` must be at least 1, but is {value} instead.")
        self.max_new_tokens, self.beams, self.samples = max_new_tokens, beams, samples
        self._pairs: TextPairs | None = None

    def equip(self, data: GenerationData, source: "ModelSource") -> None:
        data.connect(source.tokenizer(), encoder_decoder=bool(source.config().is_encoder_decoder))
        self._pairs = data.pairs

    def connect(self, data: GenerationData) -> "TextGeneration":
        """Take from the data how the model reads and writes."""
        self._pairs = data.pairs
        return self

    def load_model(self, source: "ModelSource") -> nn.Module:
        seq2seq = bool(source.config().is_encoder_decoder)
        model = source.load("AutoModelForSeq2SeqLM" if seq2seq else "AutoModelForCausalLM")
        if seq2seq:
            _tell_tokens(model.config, source.tokenizer())
        _forget_decoding(model)
        return model

    def metrics(self) -> MetricCollection:
        return MetricCollection({"accuracy": TokenAccuracy()})

    def step(self, model: nn.Module, batch: Mapping[str, Tensor]) -> StepOutput:
        """Return the mean cross-entropy of the target tokens, and the likeliest ones.

        Predictions and targets are `(rows, tokens)`, the latter with -100 where there is none.
        """
        require_labels(batch, "targets")
        logits, labels = _target_logits(model, batch)
        counts = labels != IGNORED
        targets = labels[counts]
        predictions = labels.masked_scatter(counts, logits.argmax(-1))
        return StepOutput(cross_entropy(logits, targets), predictions, labels, len(targets))

    def predictions(self, model: nn.Module, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the generated text for each row of a batch to be answered."""
        pairs = self._reading()
        found = written(
            model,
            model_inputs(batch),
            max_new_tokens=self.max_new_tokens,
            end=pairs.end,
            padding=pairs.padding,
            beams=self.beams,
        )
        return [{"text": pairs.text(row)} for row in found]

    def asked(self, loader: DataLoader[Any]) -> tuple[DataLoader[Any], Sequence[int]]:
        """Return batches to be answered of a sample of rows, drawn by a fixed seed."""
        rows: Any = loader.dataset
        numbers = sample(len(rows), self.samples, seed=0)
        return asking(loader, numbers), numbers

    @abc.abstractmethod
    def scores(
        self, targets: Sequence[Sequence[str]], predictions: Sequence[Mapping[str, Any]]
    ) -> dict[str, float]:
        """Return what generated texts are worth.

        Args:
            targets: The right answers to each row, one or several.
            predictions: One of `predictions` for each row.
        """

    def example(
        self, read: str, target: Sequence[str], prediction: Mapping[str, Any]
    ) -> Example | None:
        return Example(text=read, gold=target[0], predicted=prediction["text"])

    def baselines(
        self,
        model: nn.Module,
        train: "DataLoader[Any]",
        validation: "DataLoader[Any]",
        test: "DataLoader[Any] | None",
    ) -> list[Baseline]:
        """Return what the base writes untouched."""
        return [written_baseline(model, self, validation, test)]

    def check(self, model: nn.Module, data: GenerationData) -> None:
        """Compare the model with the batches.

        Raises:
            ConfigError: The model is of the other kind, or lacks what generation needs.
        """
        self.connect(data)
        config: Any = getattr(model, "config", None)
        found = bool(getattr(config, "is_encoder_decoder", False))
        if config is None or not callable(getattr(model, "generate", None)):
            raise ConfigError(
                f"`model` must be a transformers model that generates, but is "
                f"{type(model).__name__} instead."
            )
        if found != data.pairs.encoder_decoder:
            kinds = {True: "an encoder-decoder", False: "a causal model"}
            raise ConfigError(
                f"`data` must be connected for {kinds[found]}, which {type(model).__name__} is, "
                f"but is for {kinds[not found]}: call "
                f"`data.connect(tokenizer, encoder_decoder={found})`."
            )

    def to_spec(self) -> dict[str, Any]:
        from lightning_peft.config import target_of

        return {
            "_target_": target_of(type(self)),
            "max_new_tokens": self.max_new_tokens,
            "beams": self.beams,
            "samples": self.samples,
        }

    def _reading(self) -> TextPairs:
        if self._pairs is None:
            raise ConfigError(
                "`equip(data, source)` or `connect(data)` must be called before texts are "
                "generated."
            )
        return self._pairs


def _tell_tokens(config: Any, tokenizer: Any) -> None:
    """Let a model that was put together of two know how its decoder's rows begin and are filled."""
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    if config.decoder_start_token_id is None:
        starts = (tokenizer.cls_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
        config.decoder_start_token_id = next(token for token in starts if token is not None)


def _forget_decoding(model: Any) -> None:
    """Drop the settings of decoding that came with a base: those of the task hold."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig()


def _target_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the logits `(targets, vocabulary)` of all target tokens.

    With them come the labels `(rows, tokens)`, -100 where there is no target.
    """
    labels = batch["labels"]  # (rows, tokens)
    given = dict(batch)
    config: Any = model.config
    if config.is_encoder_decoder:
        given["decoder_input_ids"] = _shifted(labels, config)
    else:
        labels = labels[:, 1:]  # what each token is followed by
        counted = (labels != IGNORED).any(0).nonzero().flatten()
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            given["logits_to_keep"] = counted  # those of the prompt would take time and memory
            labels = labels[:, counted]
    logits = logits_of(model, given, "(rows, tokens, vocabulary)", "text generation")
    return logits[:, : labels.shape[1]][labels != IGNORED], labels


def _shifted(labels: Tensor, config: Any) -> Tensor:
    """Return what the decoder reads: the start token and the targets but for the last."""
    start = labels.new_full((len(labels), 1), config.decoder_start_token_id)
    before = labels[:, :-1]
    return torch.cat([start, before.masked_fill(before == IGNORED, config.pad_token_id)], 1)
