"""Texts and what is to be written for each: translations, summaries, answers."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_peft.data.choices import Choice, Loading
from lightning_peft.data.origin import Origin
from lightning_peft.data.rows import RowData
from lightning_peft.data.sources import FORMATS, bad_texts, require_columns
from lightning_peft.data.text_pairs import EncodePairs, PairCollator, TextPairs
from lightning_peft.data.texts import text_keys, tokenised
from lightning_peft.errors import ConfigError, near_misses

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_SIDES = ("source", "target")  # of parallel files

Files = str | Mapping[str, str | Mapping[str, str]]


class GenerationData(RowData):
    """Texts, and what a model is to write for each.

    A row has a text and its target in two columns, of a table or of parallel plain files with a
    sentence a line; `translation.en` is the part `en` of a column `translation`, as data sets of
    the hub have it. Batches are those of `PairCollator`.

    Args:
        path: One file, for `predict` the one to judge and else the one to train on; or files by
            split: train, validation, test, predict. CSV, TSV, JSON lines or Parquet; or instead of
            a file `{source: <file>, target: <file>}` with parallel lines, also `.gz`, or several as
            `{source: part*.en, target: part*.de}`. A plain file alone (`new.txt`, `new.en`) has
            texts, a line each.
        hub: Name of a data set on the hub.
        hub_config: Its configuration, where it has several.
        format: Format of the files (csv, tsv, jsonl, parquet); None takes it from each name.
        source: Column of the texts.
        target: Column of the targets; not read for `predict`.
        references: Columns of several right answers for a text, in splits that have no column
            `target`; the first is what the loss is taken on.
        prompt: What the model reads, with `{source}` where the text stands; None is the text
            alone, and a line feed behind it for a causal model.
        max_source: Tokens of a text at most; a longer one is cut, and such are counted.
        max_target: Tokens of a target at most, the end included.
        validation: Share of the training rows to hold out where there is no validation split.
        seed: Seed of that draw and of `limit`.
        batch_size: Rows in a batch.
        limit: At most so many rows of each split, drawn by seed; for trials.
        skip_bad_rows: Leave rows out that cannot be used, and count them.
        by_length: Train on batches of like lengths, which have little padding.
        num_workers: Processes that load batches.
        terms: What the owners of the data ask of who uses them; said before they are used.

    Raises:
        ConfigError: A number is out of its range, or files are named by what is no split or side.
    """

    def __init__(
        self,
        *,
        path: Files | None = None,
        hub: str | None = None,
        hub_config: str | None = None,
        format: str | None = None,  # noqa: A002  # the word that users know
        source: str = "source",
        target: str = "target",
        references: Sequence[str] = (),
        prompt: str | None = None,
        max_source: int = 256,
        max_target: int = 128,
        validation: float = 0.1,
        seed: int = 0,
        batch_size: int = 32,
        limit: int | None = None,
        skip_bad_rows: bool = False,
        by_length: bool = False,
        num_workers: int = 0,
        terms: str | None = None,
    ) -> None:
        files = path if path is None or format is not None else _by_side(path, source, target)
        super().__init__(
            Origin(path=files, hub=hub, hub_config=hub_config, format=format),
            Choice(validation=validation, seed=seed, limit=limit, skip_bad_rows=skip_bad_rows),
            Loading(batch_size=batch_size, num_workers=num_workers, by_length=by_length),
        )
        if min(max_source, max_target) < 2:
            raise ConfigError(
                f"`max_source` and `max_target` must be at least 2, but are {max_source} and "
                f"{max_target} instead."
            )
        self.source, self.target, self.references = source, target, tuple(references)
        self.prompt, self.max_source, self.max_target = prompt, max_source, max_target
        self.terms = terms
        self._pairs: TextPairs | None = None

    def prepare_data(self) -> None:
        """Say the terms of the data, once, and download a data set of the hub."""
        if self.terms is not None:
            rank_zero_info(self.terms)
            self.terms = None
        super().prepare_data()

    def connect(
        self,
        processor: "PreTrainedTokenizerBase",
        labels: Sequence[str] | None = None,
        encoder_decoder: bool = False,
    ) -> Self:
        """Take the model's tokenizer, and whether it is an encoder-decoder.

        Raises:
            ConfigError: `max_source` is more than the model can read, the prompt has no place for
                the text, or the tokenizer has no end token.
        """
        longest = self.max_source + (0 if encoder_decoder else self.max_target)
        if longest > processor.model_max_length:
            together = (
                "`max_source`" if encoder_decoder else "`max_source` and `max_target` together"
            )
            raise ConfigError(
                f"{together} must be at most {processor.model_max_length}, which is what the model "
                f"can read, but is {longest} instead."
            )
        self._pairs = TextPairs(processor, encoder_decoder, self.prompt)
        self._items.clear()
        return self

    @property
    def pairs(self) -> TextPairs:
        """How the model reads and writes."""
        if self._pairs is None:
            raise ConfigError("`connect(tokenizer)` must be called before batches can be made.")
        return self._pairs

    def columns(self, split: str, rows: "Dataset") -> dict[str, str | None]:
        wanted = {"source": self.source, **self._named_targets(split, rows)}
        return {setting: _top(name, rows) for setting, name in wanted.items()}

    def problems(self, split: str, rows: "Dataset", number: Callable[[int], int]) -> dict[int, str]:
        rows, origin = self.formed(split, rows), self.origin.name(split)
        wanted = {"source": self.source, **self._named_targets(split, rows)}
        require_columns(rows, origin, **wanted)
        found: dict[int, str] = {}
        for column in (self.source, *self._targets(split, rows)):
            found = bad_texts(rows, origin, column, number) | found
        return dict(sorted(found.items()))

    def formed(self, split: str, rows: "Dataset") -> "Dataset":
        names = (self.source, self.target, *self.references)
        return rows.flatten() if any(_top(name, rows) != name for name in names) else rows

    def keys(self, rows: "Dataset") -> list[Hashable]:
        return text_keys(rows, [self.source])

    def strata(self, split: str, rows: "Dataset") -> list[int]:
        return [0] * len(rows)

    def items(self, split: str, rows: "Dataset") -> "Dataset":
        targets = self._targets(split, rows)
        encode = EncodePairs(self.pairs, self.source, targets, self.max_source, self.max_target)
        found = tokenised(rows, encode)
        cut = sum(found["cut"])
        if cut:
            rank_zero_info(
                f"Cut {cut:,} of {len(found):,} rows ({split}) at {self.max_source} tokens of text "
                f"or {self.max_target} of target."
            )
        return found.remove_columns("cut")

    def collator(self) -> PairCollator:
        return PairCollator(self.pairs.padding, self.pairs.encoder_decoder)

    def inputs(self, split: str) -> list[str]:
        return list(self.chosen(split)[self.source])

    def targets(self, split: str) -> list[list[str]]:
        """Return the right answers for each row of a split."""
        rows = self.chosen(split)
        columns = [rows[name] for name in self._targets(split, rows)]
        return [list(texts) for texts in zip(*columns, strict=True)]

    def _named_targets(self, split: str, rows: "Dataset") -> dict[str, str]:
        """Return the columns of right answers by the setting that names each."""
        if split == "predict":
            return {}
        if self.references and _top(self.target, rows) not in rows.column_names:
            return {f"references[{i}]": name for i, name in enumerate(self.references)}
        return {"target": self.target}

    def _targets(self, split: str, rows: "Dataset") -> tuple[str, ...]:
        return tuple(self._named_targets(split, rows).values())


def _top(name: str, rows: "Dataset") -> str:
    """Return the column that holds `name`: `translation` for `translation.en`."""
    top = name.partition(".")[0]
    return top if name not in rows.column_names and top in rows.column_names else name


def _by_side(path: Files, source: str, target: str) -> Files:
    """Return the files by split, those of parallel text by column.

    Sides that are named without a split are those to predict, and to train on where no split is
    named at all.
    """
    columns = dict(zip(_SIDES, (source, target), strict=True))
    if isinstance(path, str):
        return {split: _plain(path, columns) for split in ("train", "predict")}
    splits = {name: file for name, file in path.items() if name not in _SIDES}
    sides = {name: file for name, file in path.items() if name in _SIDES and isinstance(file, str)}
    if sides:
        splits = splits or {"train": sides}
        splits["predict"] = sides
    return {
        name: _plain(file, columns) if isinstance(file, str) else _named(name, file, columns)
        for name, file in splits.items()
    }


def _plain(file: str, columns: Mapping[str, str]) -> str | dict[str, str]:
    """Return a file of texts alone by its column, and others as they are."""
    kind = FORMATS.get(Path(file.removesuffix(".gz")).suffix.lower(), "txt")
    return {columns["source"]: file} if kind == "txt" else file


def _named(split: str, files: Mapping[str, str], columns: Mapping[str, str]) -> dict[str, str]:
    for side in files:
        if side not in columns:
            raise ConfigError(
                f"`path.{split}` must be a file or parallel files by side ({', '.join(_SIDES)}), "
                f"but has {side!r} instead.{near_misses(side, _SIDES)}"
            )
    return {columns[side]: file for side, file in files.items()}
