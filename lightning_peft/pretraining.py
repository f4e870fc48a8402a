"""Bases that are trained on this machine, once, where no pretrained one can be had."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_peft.callbacks import progress_bar
from lightning_peft.data.bad_rows import BadRows
from lightning_peft.data.generation import GenerationData
from lightning_peft.data.packaged import located
from lightning_peft.data.parallel import existing, read_parallel
from lightning_peft.errors import ConfigError
from lightning_peft.files.once import built_once
from lightning_peft.methods import FullFineTuning
from lightning_peft.models import TrainedBase, file_sha256
from lightning_peft.module import PEFTModule
from lightning_peft.tasks.translation import Translation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_VERSION = 2  # of what is made; another one makes all bases anew
_PADDING, _END = "<pad>", "</s>"
_TOKENS = 64  # of a sentence at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Translator(TrainedBase):
    """A small Marian (Junczys-Dowmunt et al. 2018) that learns translation from parallel text.

    Its small initial weights and sinusoidal positions suit AdamW; a T5 of that size, whose
    embeddings start twenty times as large, learns much more slowly.

    Its tokenizer (byte-level BPE, Sennrich et al. 2016) is learned from the training sentences of
    both languages, its weights from random ones by full training. It lies in the hub's cache under
    a digest of these settings and of the files' contents.

    Raises:
        ConfigError: A number is out of its range, or a file is not named.
    """

    path: Mapping[str, Mapping[str, str]]
    """Parallel files by split and side: `{train: {source: ..., target: ...}, validation: ...}`."""
    vocabulary: int = 4000
    """Tokens at most."""
    d_model: int = 256
    """Width of the hidden states."""
    d_ff: int = 1024
    """Width of the feed-forward layers."""
    layers: int = 3
    """Layers of the encoder, and as many of the decoder."""
    heads: int = 4
    """Attention heads of a layer."""
    dropout: float = 0.1
    """Share of activations that are dropped in training."""
    epochs: int = 10
    """Passes over the training sentences."""
    batch_size: int = 64
    """Sentence pairs in a batch."""
    lr: float = 1e-3
    """Peak learning rate."""
    limit: int | None = None
    """At most so many sentence pairs of each split; for trials."""
    seed: int = 0
    """Seed of the weights and of the order of training."""

    def __post_init__(self) -> None:
        sides = {split: set(files) for split, files in self.path.items()}
        if any(sides.get(split) != {"source", "target"} for split in ("train", "validation")):
            raise ConfigError(
                f"`path` must name a source and a target for train and for validation, but is "
                f"{dict(self.path)} instead."
            )
        if self.d_model % self.heads:
            raise ConfigError(
                f"`d_model` must be a multiple of `heads` ({self.heads}), but is {self.d_model} "
                f"instead."
            )

    def folder(self) -> Path:
        """Return the folder of the trained model, which the first call trains.

        Raises:
            DataError: A file is missing or damaged.
        """
        return built_once("translator", self._digest(), self._train)

    def _digest(self) -> str:
        """Return what tells this base from others: the settings, and what the files hold."""
        settings = {k: v for k, v in dataclasses.asdict(self).items() if k != "path"}
        files = {
            f"{split}.{side}": file_sha256(existing(located(file)))
            for split, by_side in self.path.items()
            for side, file in by_side.items()
        }
        described = json.dumps([_VERSION, settings, files], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()

    def _train(self, folder: Path) -> None:
        rank_zero_info("Training the translator that is adapted later, once.")
        started = time.perf_counter()
        with isolate_rng():
            torch.manual_seed(self.seed)
            data = self._data()
            tokenizer = self._tokenizer(self._sentences())
            data.connect(tokenizer, encoder_decoder=True)
            model = self._model(tokenizer)
            task = Translation(samples=None).connect(data)
            module = PEFTModule(model, FullFineTuning(), task, lr=self.lr)
            trainer = _trainer(self.epochs)
            trainer.fit(module, datamodule=data)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found = {"epochs": self.epochs, "seconds": time.perf_counter() - started}
        found |= {k: float(v) for k, v in trainer.callback_metrics.items()}
        (folder / "training.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        rank_zero_info(f"Trained in {found['seconds']:.0f} seconds: {folder.parent}")

    def _data(self) -> GenerationData:
        return GenerationData(
            path=self.path,
            max_source=_TOKENS,
            max_target=_TOKENS,
            batch_size=self.batch_size,
            limit=self.limit,
            seed=self.seed,
            by_length=True,
        )

    def _sentences(self) -> Iterator[str]:
        table = read_parallel({k: located(v) for k, v in self.path["train"].items()}, BadRows())
        for side in ("source", "target"):
            yield from table[side]

    def _tokenizer(self, sentences: Iterable[str]) -> "PreTrainedTokenizerBase":
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
        from transformers import PreTrainedTokenizerFast

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocabulary,
            special_tokens=[_PADDING, _END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(sentences, trainer)
        end = tokenizer.token_to_id(_END)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {_END}", special_tokens=[(_END, end)]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token=_PADDING, eos_token=_END, model_max_length=512
        )

    def _model(self, tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedModel":
        from transformers import MarianConfig, MarianMTModel

        layers, heads, d_ff = self.layers, self.heads, self.d_ff
        config = MarianConfig(
            vocab_size=len(tokenizer),
            d_model=self.d_model,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_attention_heads=heads,
            decoder_attention_heads=heads,
            encoder_ffn_dim=d_ff,
            decoder_ffn_dim=d_ff,
            dropout=self.dropout,
            max_position_embeddings=512,
            scale_embedding=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
        return MarianMTModel(config)


def _trainer(epochs: int) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="auto",
        devices=1,
        gradient_clip_val=1.0,
        callbacks=[progress_bar()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
