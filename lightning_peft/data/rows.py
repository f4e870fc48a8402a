"""`RowData`: what the data modules of all tasks share; each says what is a row of its task."""

import abc
import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader

from lightning_peft.data.bad_rows import BadRows
from lightning_peft.data.by_length import ByLength, lengths_of
from lightning_peft.data.choices import Choice, Loading
from lightning_peft.data.known import Place, RowCheck
from lightning_peft.data.origin import SPLITS, Origin
from lightning_peft.data.sharing import shared_order, shared_rows
from lightning_peft.data.sources import require_columns
from lightning_peft.data.splits import few, sample, stratified_split, unseen
from lightning_peft.data.streams import BLOCK, RowStream, StreamLoader, check_streamed, progress_of
from lightning_peft.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset

_STAGES = dict(zip(SPLITS, ("fit", "fit", "test", "predict"), strict=True))


class RowData(pl.LightningDataModule, abc.ABC):
    """Rows by split, read once, checked, and made into batches.

    Without a validation split one is drawn from the training rows, and so is a test split where its
    share is given. Training rows that are held out too are left out, and counted in `dropped`; rows
    that cannot be used stop the reading, or are left out and counted in `skipped`. Training order
    follows the global random state, or the seed and the epoch where batches are made of like
    lengths.

    A data module of a task derives from this class and says what the columns are, what is wrong
    with a row, and what the model gets of it.

    Args:
        origin: Where the rows come from.
        choice: Which of them are used.
        loading: How batches are made of them.
    """

    def __init__(self, origin: Place, choice: Choice, loading: Loading) -> None:
        super().__init__()
        if loading.streaming:
            if isinstance(origin, Origin) and origin.source is not None:
                raise ConfigError(
                    f"`streaming` must be false with `source`, which is read as a whole, but "
                    f"`source` is {origin.source!r}."
                )
            check_streamed(limit=choice.limit, shots=choice.shots, test=choice.test)
        self.origin, self.choice, self.loading = origin, choice, loading
        self.batch_size = loading.batch_size  # where Lightning's batch-size finder looks for it
        self.dropped = 0
        """Training rows left out because a held-out split has them too."""
        self.skipped: dict[str, int] = {}
        """Rows of each split left out because they cannot be used."""
        self.also: RowCheck | None = None
        """What is asked of rows besides, set before the first is read."""
        self._tables: dict[str, Dataset | None] = {}  # as read; None is a split without rows
        self._rows: dict[str, Dataset] = {}  # as split and limited
        self._items: dict[str, Any] = {}  # what the model gets of them

    @abc.abstractmethod
    def connect(self, processor: Any, labels: Sequence[str] | None = None) -> Self:
        """Take what the model reads with, and the labels of one that is already trained."""

    @abc.abstractmethod
    def columns(self, split: str, rows: "Dataset") -> dict[str, str | None]:
        """Return the columns that rows must have, by the setting that names each."""

    @abc.abstractmethod
    def problems(self, split: str, rows: "Dataset", number: Callable[[int], int]) -> dict[int, str]:
        """Return what is wrong with rows, by their index.

        Args:
            split: Which they are of.
            rows: As read, with the columns that they must have.
            number: Gives the number in the file of the row with an index.
        """

    def formed(self, split: str, rows: "Dataset") -> "Dataset":
        """Return rows without a problem in the form that the task knows; as they are by default."""
        return rows

    @abc.abstractmethod
    def keys(self, rows: "Dataset") -> list[Hashable]:
        """Return what makes two rows the same, so that one must not be held out and trained on."""

    @abc.abstractmethod
    def strata(self, split: str, rows: "Dataset") -> list[int]:
        """Return numbers whose proportions a drawn split keeps: the labels, or zeros."""

    def drawn(self, split: str, rows: "Dataset", share: float) -> tuple[list[int], list[int]]:
        """Draw by seed what to hold out; return the numbers of the rows kept and held out.

        Rows are drawn one by one, and `strata` keep their proportions, by default.
        """
        return stratified_split(self.strata(split, rows), share, self.choice.seed)

    @abc.abstractmethod
    def items(self, split: str, rows: "Dataset") -> Any:
        """Return what the model gets of each row, as a sequence."""

    @abc.abstractmethod
    def collator(self) -> Callable[[Any], Any]:
        """Return what makes a batch of a list of items; it must survive pickling."""

    @abc.abstractmethod
    def inputs(self, split: str) -> list[Any]:
        """Return what the model reads of each row of a split, as a person knows it."""

    @abc.abstractmethod
    def targets(self, split: str) -> list[Any]:
        """Return what is right for each row of a split."""

    def has_split(self, split: str) -> bool:
        """Whether there are rows for `split`: train, validation, test or predict."""
        if self.loading.streaming:
            return split == "train" or self._read(split) is not None
        draws = split == "validation" or (split == "test" and self.choice.test is not None)
        return (draws and self._read("train") is not None) or self._read(split) is not None

    def rows(self, split: str) -> list[dict[str, Any]]:
        """Return the rows of a split as they were read, in the order of its unshuffled loader."""
        return self.chosen(split).to_list()

    def predict_rows(self) -> list[dict[str, Any]]:
        """Return the rows to predict as they were read, in the order of the predictions."""
        return self.rows("predict")

    def prepare_data(self) -> None:
        """Download a data set of the hub, once on each machine."""
        self.origin.prepare()

    def setup(self, stage: str) -> None:
        """Read, check and split what the stage needs; a second call changes nothing.

        Raises:
            DataError: A file, a column or a row is not as it must be.
        """
        if stage in ("fit", "validate") and "train" not in self._rows:
            self._stream_training_rows() if self.loading.streaming else self._split_training_rows()
        elif stage == "test" and stage not in self._rows:
            held_out = self._test_rows()
            self._rows["test"] = self._held_out(
                self.table("test") if held_out is None else held_out
            )
        elif stage == "predict" and stage not in self._rows:
            self._rows["predict"] = self.table("predict")

    def train_dataloader(self) -> Any:
        if self.loading.streaming:
            return self._stream_loader()
        loader = self._loader("train", True)
        return shared_order(loader) if self.loading.by_length else loader

    def val_dataloader(self) -> Any:
        return shared_rows(self._loader("validation"))

    def test_dataloader(self) -> Any:
        return shared_rows(self._loader("test"))

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader("predict")

    def table(self, split: str) -> "Dataset":
        """Return the rows of a split as read, those that cannot be used left out.

        Raises:
            DataError: There are none, or one cannot be used.
        """
        table = self._read(split)
        if table is None:
            files = ", ".join(f"{name}: <file>" for name in dict.fromkeys(("train", split)))
            raise DataError(
                f"`path` must give rows for {split}, but {self.origin.name(split)} has none: name "
                f"files by split, as in `data.path='{{{files}}}'`."
            )
        return table

    def chosen(self, split: str) -> "Dataset":
        """Return the rows of a split that are used, in the order of its unshuffled loader.

        Of training rows that are streamed it is the first block.
        """
        self.setup(_STAGES[split])
        return self._rows[split]

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader[Any]:
        if split not in self._items:
            self._items[split] = self.items(split, self.chosen(split))
        items, workers = self._items[split], self.loading.num_workers
        by_length = shuffle and self.loading.by_length
        return DataLoader(
            items,
            batch_size=self.batch_size,
            shuffle=shuffle and not by_length,
            sampler=self._sampler(items) if by_length else None,
            collate_fn=self.collator(),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def _stream_loader(self) -> StreamLoader:
        self.setup("fit")
        if self.trainer is not None and self.trainer.max_steps == -1:
            raise ConfigError(
                "`trainer.max_steps` must be given with `data.streaming`, since nobody knows how "
                "many rows there are."
            )
        reader = copy.copy(self)  # without the Trainer, to be sent to workers
        reader.trainer = None
        make = partial(RowStream, reader._blocks, partial(reader.items, "train"), self.choice.seed)
        workers = self.loading.num_workers
        return StreamLoader(
            make, partial(progress_of, self.trainer), self.batch_size, self.collator(), workers
        )

    def _blocks(self) -> Iterator["Dataset"]:
        """Read the training rows by blocks; those that cannot be used or are held out are left out.

        Raises:
            DataError: There are none at all, or one cannot be used.
        """
        if not isinstance(self.origin, Origin):
            raise ConfigError(f"`streaming` must be false for {self.origin.name('train')}.")
        bad, empty = BadRows(self.choice.skip_bad_rows), True
        tables = [self._read(split) for split in ("validation", "test")]
        held_out = {key for table in tables if table is not None for key in self.keys(table)}
        for table in self.origin.stream("train", bad, BLOCK):
            rows = self._checked("train", table, bad)
            if rows is not None:
                rows = rows.select(unseen(self.keys(rows), held_out))
                empty = empty and len(rows) == 0
                yield rows
        self._tell_skipped("train", bad)
        if empty:
            raise DataError(
                f"{self.origin.name('train')} must hold rows to train on, but has none."
            )

    def _stream_training_rows(self) -> None:
        validation = self.table("validation")
        self._rows |= {"train": next(self._blocks()), "validation": self._held_out(validation)}

    def _sampler(self, items: Any) -> ByLength:
        return ByLength(lengths_of(items["input_ids"]), self.batch_size, self.choice.seed)

    def _split_training_rows(self) -> None:
        table, validation = self._training_rows(), self._read("validation")
        train = self._without(table, self._test_rows())
        self.dropped = len(table) - len(train)
        if validation is None:
            share = self.choice.validation / (1 - self._test_share())
            kept, drawn = self.drawn("train", train, share)
            train, validation = train.select(kept), train.select(drawn)
        new = self._without(train, validation)
        self.dropped += len(train) - len(new)
        if self.dropped:
            rank_zero_info(f"Left out {self.dropped:,} training rows that are held out too.")
        if len(new) == 0:
            raise DataError(
                f"`path` must give training rows that are not held out too, but all of "
                f"{self.origin.name('train')} stand in another split."
            )
        if self.choice.shots is not None:
            new = new.select(few(self.strata("train", new), self.choice.shots, self.choice.seed))
        self._rows |= {"train": self._limited(new), "validation": self._held_out(validation)}

    def _test_share(self) -> float:
        """Return the share of the training rows that is drawn for the test, 0 for none."""
        if self.choice.test is None or self._read("test") is not None:
            return 0.0
        return self.choice.test

    def _training_rows(self) -> "Dataset":
        """Return the training rows but for those that are drawn for the test."""
        rows, share = self.table("train"), self._test_share()
        return rows.select(self.drawn("train", rows, share)[0]) if share else rows

    def _test_rows(self) -> "Dataset | None":
        """Return the rows of the test split, given or drawn; None where there are none."""
        share = self._test_share()
        if not share:
            return self._read("test")
        rows = self.table("train")
        return rows.select(self.drawn("train", rows, share)[1])

    def _without(self, rows: "Dataset", held_out: "Dataset | None") -> "Dataset":
        """Return the rows that do not stand in `held_out`."""
        if held_out is None:
            return rows
        return rows.select(unseen(self.keys(rows), self.keys(held_out)))

    def _limited(self, rows: "Dataset") -> "Dataset":
        return rows.select(sample(len(rows), self.choice.limit, self.choice.seed))

    def _held_out(self, rows: "Dataset") -> "Dataset":
        """Return validation or test rows that are used."""
        limited = self._limited(rows)
        return limited.select(sample(len(limited), self.choice.held_out, self.choice.seed))

    def _read(self, split: str) -> "Dataset | None":
        """Read and check a split once; None where there is none."""
        if split == "train" and self.loading.streaming:
            raise ConfigError(
                "`streaming` leaves the training rows where they are, so that nothing can be read "
                "off all of them: give `data.labels`, or what else the task takes from the rows."
            )
        if split not in self._tables:
            bad = BadRows(self.choice.skip_bad_rows)
            table = self.origin.read(split, bad)
            self._tables[split] = None if table is None else self._checked(split, table, bad)
            self._tell_skipped(split, bad)
            if table is not None and self._tables[split] is None:
                raise DataError(f"no row can be used: {bad.reasons[0]}")
        return self._tables[split]

    def _checked(self, split: str, table: "Dataset", bad: BadRows) -> "Dataset | None":
        """Return the rows that can be used, in the form that the task knows; None for none."""
        checks = (self,) if self.also is None else (self, self.also)
        for each in checks:
            require_columns(table, self.origin.name(split), **each.columns(split, table))
        found = [each.problems(split, table, bad.number) for each in reversed(checks)]
        problems = {i: reason for each in found for i, reason in each.items()}
        kept = bad.without(table, dict(sorted(problems.items())))
        return self.formed(split, kept) if len(kept) else None

    def _tell_skipped(self, split: str, bad: BadRows) -> None:
        self.skipped[split] = len(bad.reasons)
        if bad.reasons:
            rank_zero_info(
                f"Left out {len(bad.reasons):,} rows of {self.origin.name(split)} that cannot "
                f"be used. The first: {bad.reasons[0]}"
            )
