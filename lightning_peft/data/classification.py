"""Texts with a label each, from files, the hub or the packaged reviews, as padded batches."""

import dataclasses
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader

from lightning_peft.data.labels import encode, infer_labels
from lightning_peft.data.reviews import read_reviews
from lightning_peft.data.sources import (
    hidden_progress,
    read_file,
    read_hub,
    require_columns,
    require_texts,
)
from lightning_peft.data.splits import normalised, sample, stratified_split, unseen
from lightning_peft.errors import ConfigError, DataError, near_misses

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_STAGES = {"train": "fit", "validation": "fit", "test": "test", "predict": "predict"}
_SLOW = 20_000  # rows from which on tokenisation shows its progress


@dataclasses.dataclass(frozen=True)
class Tokenise:
    """Turns rows into token numbers, cut at `max_length` and not yet padded."""

    tokenizer: "PreTrainedTokenizerBase"
    text: str
    text_pair: str | None
    max_length: int

    def __call__(self, rows: Mapping[str, list[Any]]) -> dict[str, Any]:
        pairs = rows[self.text_pair] if self.text_pair is not None else None
        encoded = self.tokenizer(
            rows[self.text], pairs, truncation=True, max_length=self.max_length
        )
        return dict(encoded)


class ClassificationData(pl.LightningDataModule):
    """Texts (or pairs of texts) with one label each.

    The rows come from `path`, else from `hub`, else from the packaged `source`. Without a
    validation split one is drawn from the training rows by `seed`, each label in proportion.
    Training rows whose text stands in a held-out split too are left out, and counted in `dropped`.

    Batches are dictionaries of tensors: `input_ids` and `attention_mask` of shape
    `(batch, tokens)`, padded to the longest text of the batch, and `labels` of shape `(batch,)`.

    Example:
        >>> data = ClassificationData(path={"train": "train.csv", "test": "test.csv"})
        >>> data.connect(source.tokenizer()).setup("fit")
        >>> data.labels
        ('bad', 'good')

    Args:
        path: One file, for `predict` the one to judge and else the one to train on; or files by
            split: train, validation, test, predict. CSV, TSV, JSON lines or Parquet.
        hub: Name of a data set on the hub.
        hub_config: Its configuration, where it has several.
        source: Data that a package carries: `reviews`.
        format: Format of the files (csv, tsv, jsonl, parquet); None takes it from each name.
        columns: Names of the columns of CSV or TSV files without a header line.
        text: Column of the texts.
        text_pair: Column of the second texts, for tasks on pairs.
        label: Column of the labels; not read for `predict`.
        labels: The labels in the order of the model's outputs; None takes those of the training
            rows in ascending order, numbers by value.
        validation: Share of the training rows to hold out where there is no validation split.
        seed: Seed of that draw and of `limit`; training order follows the global random state.
        batch_size: Rows in a batch.
        max_length: Tokens at which a text is cut.
        limit: At most so many rows of each split, drawn by seed; for trials.
        num_workers: Processes that load batches.
    """

    def __init__(
        self,
        *,
        path: str | Mapping[str, str] | None = None,
        hub: str | None = None,
        hub_config: str | None = None,
        source: Literal["reviews"] | None = None,
        format: str | None = None,  # noqa: A002  # the word that users know
        columns: Sequence[str] | None = None,
        text: str = "text",
        text_pair: str | None = None,
        label: str = "label",
        labels: Sequence[str | int] | None = None,
        validation: float = 0.1,
        seed: int = 0,
        batch_size: int = 32,
        max_length: int = 256,
        limit: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.path, self.hub, self.hub_config, self.source = path, hub, hub_config, source
        self.format, self.columns = format, columns
        self.text, self.text_pair, self.label = text, text_pair, label
        self.validation, self.seed, self.limit = validation, seed, limit
        self.batch_size, self.max_length = batch_size, max_length
        self.num_workers = num_workers
        self.dropped = 0
        """Training rows left out because a held-out split has their text too."""
        self._labels = tuple(str(name) for name in labels) if labels is not None else None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._tables: dict[str, Dataset | None] = {}  # as read; None is a split without rows
        self._rows: dict[str, Dataset] = {}  # as split and limited
        self._tokens: dict[str, Dataset] = {}
        self._check_settings()

    def connect(
        self, tokenizer: "PreTrainedTokenizerBase", labels: Sequence[str] | None = None
    ) -> Self:
        """Take the model's tokenizer and, for a model that is already trained, its labels.

        Raises:
            ConfigError: `max_length` is more than the model can read.
        """
        if self.max_length > tokenizer.model_max_length:
            raise ConfigError(
                f"`max_length` must be at most {tokenizer.model_max_length}, which is what the "
                f"model can read, but is {self.max_length} instead."
            )
        self._tokenizer = tokenizer
        self._labels = tuple(labels) if labels is not None else self._labels
        self._tokens.clear()
        return self

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels in the order of the model's outputs; reads the training rows if need be."""
        if self._labels is None:
            self._labels = infer_labels(self._table("train"), self.label, self._origin("train"))
        return self._labels

    def has_split(self, split: str) -> bool:
        """Whether there are rows for `split`: train, validation, test or predict."""
        drawn = split == "validation" and self._read("train") is not None
        return drawn or self._read(split) is not None

    def rows(self, split: str) -> list[dict[str, Any]]:
        """Return the rows of a split as they were read, in the order of its unshuffled loader."""
        self.setup(_STAGES[split])
        return self._rows[split].to_list()

    def predict_rows(self) -> list[dict[str, Any]]:
        """Return the rows to predict as they were read, in the order of the predictions."""
        return self.rows("predict")

    def label_counts(self, split: str) -> dict[str, int]:
        """Return how many rows of a split have each of the labels."""
        self.setup(_STAGES[split])
        counts = Counter(self._numbers(split, self._rows[split]))
        return {name: counts[number] for number, name in enumerate(self.labels)}

    def prepare_data(self) -> None:
        """Download a data set of the hub, once on each machine."""
        if self.path is None and self.hub is not None:
            read_hub(self.hub, self.hub_config)

    def setup(self, stage: str) -> None:
        """Read, check and split what the stage needs; a second call changes nothing.

        Raises:
            DataError: A file, a column, a text or a label is not as it must be.
        """
        if stage in ("fit", "validate") and "train" not in self._rows:
            self._split_training_rows()
        elif stage == "test" and stage not in self._rows:
            table = self._table("test")
            self._numbers("test", table)
            self._rows["test"] = self._limited(table)
        elif stage == "predict" and stage not in self._rows:
            self._rows["predict"] = self._table("predict")

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("validation")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader("predict")

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader[Any]:
        from transformers import DataCollatorWithPadding

        if self._tokenizer is None:
            raise ConfigError("`connect(tokenizer)` must be called before batches can be made.")
        return DataLoader(
            self._tokenised(split, self._tokenizer),
            batch_size=self.batch_size,
            shuffle=shuffle,
            collate_fn=DataCollatorWithPadding(self._tokenizer),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def _tokenised(self, split: str, tokenizer: "PreTrainedTokenizerBase") -> "Dataset":
        self.setup(_STAGES[split])
        if split not in self._tokens:
            rows = self._rows[split]
            with hidden_progress(len(rows) < _SLOW or not sys.stderr.isatty()):
                tokens = rows.map(
                    Tokenise(tokenizer, self.text, self.text_pair, self.max_length),
                    batched=True,
                    remove_columns=rows.column_names,
                    desc="Reading texts",
                )
            if split != "predict":
                tokens = tokens.add_column("labels", self._numbers(split, rows))
            self._tokens[split] = tokens
        return self._tokens[split]

    def _split_training_rows(self) -> None:
        table, validation = self._table("train"), self._read("validation")
        self._numbers("train", table)  # a wrong label is told by its row in the file
        train = self._without(table, self._read("test"))
        self.dropped = len(table) - len(train)
        if validation is not None:
            self._numbers("validation", validation)
        else:
            numbers = self._numbers("train", train)
            kept, drawn = stratified_split(numbers, self.validation, self.seed)
            train, validation = train.select(kept), train.select(drawn)
        new = self._without(train, validation)
        self.dropped += len(train) - len(new)
        if self.dropped:
            rank_zero_info(f"Left out {self.dropped:,} training rows whose text is held out too.")
        if len(new) == 0:
            raise DataError(
                f"`path` must give training rows that are not held out too, but all of "
                f"{self._origin('train')} stand in another split."
            )
        self._rows |= {"train": self._limited(new), "validation": self._limited(validation)}

    def _without(self, rows: "Dataset", held_out: "Dataset | None") -> "Dataset":
        """Return the rows whose text does not stand in `held_out`."""
        if held_out is None:
            return rows
        return rows.select(unseen(self._keys(rows), self._keys(held_out)))

    def _limited(self, rows: "Dataset") -> "Dataset":
        return rows.select(sample(len(rows), self.limit, self.seed))

    def _numbers(self, split: str, rows: "Dataset") -> list[int]:
        return encode(rows, self.label, self.labels, self._origin(split))

    def _keys(self, rows: "Dataset") -> list[tuple[str, ...]]:
        """Return what makes two rows the same: the text or texts, case and spaces aside."""
        columns = [self.text] if self.text_pair is None else [self.text, self.text_pair]
        texts = [map(normalised, rows[column]) for column in columns]
        return list(zip(*texts, strict=True))

    def _table(self, split: str) -> "Dataset":
        table = self._read(split)
        if table is None:
            raise DataError(
                f"`path` must give rows for {split}, but {self._origin(split)} has none: name "
                f"files by split, as in `data.path='{{train: <file>, {split}: <file>}}'`."
            )
        return table

    def _read(self, split: str) -> "Dataset | None":
        """Read and check a split once; None where there is none."""
        if split not in self._tables:
            table = self._load(split)
            if table is not None:
                origin = self._origin(split)
                label = None if split == "predict" else self.label
                require_columns(
                    table, origin, text=self.text, text_pair=self.text_pair, label=label
                )
                for column in filter(None, (self.text, self.text_pair)):
                    require_texts(table, origin, column)
            self._tables[split] = table
        return self._tables[split]

    def _load(self, split: str) -> "Dataset | None":
        if self.path is not None:
            file = self._files().get(split)
            return read_file(file, self.format, self.columns) if file is not None else None
        name = "test" if split == "predict" else split
        tables = read_hub(self.hub, self.hub_config) if self.hub is not None else read_reviews()
        return tables.get(name)

    def _files(self) -> dict[str, str]:
        if self.path is None:
            return {}
        if isinstance(self.path, str):
            return {"train": self.path, "predict": self.path}
        files = dict(self.path)
        return {"predict": files["test"]} | files if "test" in files else files

    def _origin(self, split: str) -> str:
        """Return what a person calls the place that the rows of a split come from."""
        if self.path is not None:
            return f"`{self._files().get(split, self.path)}`"
        return f"`{self.hub}` ({split})" if self.hub is not None else f"the reviews ({split})"

    def _check_settings(self) -> None:
        if self.path is None and self.hub is None and self.source is None:
            raise ConfigError(
                "`path` must be a file (or `hub` a data set, or `source` be reviews), but none "
                "of them is given."
            )
        if self.source not in (None, "reviews"):
            raise ConfigError(f"`source` must be reviews, but is {self.source!r} instead.")
        for name in self._files():
            if name not in _STAGES:
                raise ConfigError(
                    f"`path` must be given by split ({', '.join(_STAGES)}), but has {name!r} "
                    f"instead.{near_misses(name, _STAGES)}"
                )
        for setting in ("batch_size", "max_length", "limit"):
            value = getattr(self, setting)
            if value is not None and value < 1:
                raise ConfigError(f"`{setting}` must be at least 1, but is {value} instead.")
        if self._labels is not None and len(set(self._labels)) < max(2, len(self._labels)):
            raise ConfigError(
                f"`labels` must be two or more different names, but is {self._labels} instead."
            )
