"""Texts with a label each, from files, the hub or the packaged reviews, as padded batches."""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_peft.data.choices import Choice, Loading
from lightning_peft.data.labels import bad_labels, encode, infer_labels
from lightning_peft.data.origin import Origin
from lightning_peft.data.sources import bad_texts
from lightning_peft.data.texts import Tokenise, text_keys, tokenised
from lightning_peft.data.tokenised import TokenisedData
from lightning_peft.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset


class ClassificationData(TokenisedData):
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
            split: train, validation, test, predict. CSV, TSV, JSON lines, Parquet, or for
            `predict` plain lines.
        hub: Name of a data set on the hub.
        hub_config: Its configuration, where it has several.
        source: Data that a package carries: `reviews` or `drug_reviews`.
        format: Format of the files (csv, tsv, jsonl, parquet, txt); None takes it from each name.
        columns: Names of the columns of CSV or TSV files without a header line.
        text: Column of the texts.
        text_pair: Column of the second texts, for tasks on pairs.
        label: Column of the labels; not read for `predict`.
        labels: The labels in the order of the model's outputs; None takes those of the training
            rows in ascending order, numbers by value.
        validation: Share of the training rows to hold out where there is no validation split.
        seed: Seed of that draw, of `limit` and `shots`; training order follows the global random
            state, or this seed with `by_length`.
        batch_size: Rows in a batch.
        max_length: Tokens at which a text is cut.
        limit: At most so many rows of each split, drawn by seed; for trials.
        shots: At most so many training rows of each label, drawn by seed.
        skip_bad_rows: Leave rows out that cannot be used, and count them.
        by_length: Train on batches of like lengths, which have little padding.
        num_workers: Processes that load batches.
        streaming: Leave the training rows on disk or the hub, and read them block by block.
    """

    def __init__(
        self,
        *,
        path: str | Mapping[str, str] | None = None,
        hub: str | None = None,
        hub_config: str | None = None,
        source: str | None = None,
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
        shots: int | None = None,
        skip_bad_rows: bool = False,
        by_length: bool = False,
        num_workers: int = 0,
        streaming: bool = False,
    ) -> None:
        super().__init__(
            Origin(
                path=path, hub=hub, hub_config=hub_config, source=source, format=format,
                columns=columns,
            ),
            Choice(
                validation=validation, seed=seed, limit=limit, shots=shots,
                skip_bad_rows=skip_bad_rows,
            ),
            Loading(
                batch_size=batch_size, num_workers=num_workers, by_length=by_length,
                streaming=streaming,
            ),
        )  # fmt: skip
        self.text, self.text_pair, self.label = text, text_pair, label
        self.max_length = max_length
        self._labels = tuple(str(name) for name in labels) if labels is not None else None
        self._check_settings()

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels in the order of the model's outputs; reads the training rows if need be."""
        if self._labels is None:
            table, origin = self.table("train"), self.origin.name("train")
            self._labels = infer_labels(table, self.label, origin)
        return self._labels

    def label_counts(self, split: str) -> dict[str, int]:
        """Return how many rows of a split have each of the labels."""
        counts = Counter(self.strata(split, self.chosen(split)))
        return {name: counts[number] for number, name in enumerate(self.labels)}

    def columns(self, split: str, rows: "Dataset") -> dict[str, str | None]:
        label = None if split == "predict" else self.label
        return {"text": self.text, "text_pair": self.text_pair, "label": label}

    def problems(self, split: str, rows: "Dataset", number: Callable[[int], int]) -> dict[int, str]:
        origin = self.origin.name(split)
        found: dict[int, str] = {}
        for column in self._texts():
            found = bad_texts(rows, origin, column, number) | found
        if split != "predict":
            # The training rows themselves say what labels there are, unless a setting does.
            known = self._labels if split == "train" else self.labels
            found = bad_labels(rows, self.label, known, origin, number) | found
        return dict(sorted(found.items()))

    def keys(self, rows: "Dataset") -> list[Hashable]:
        return text_keys(rows, self._texts())

    def strata(self, split: str, rows: "Dataset") -> list[int]:
        return encode(rows, self.label, self.labels, self.origin.name(split))

    def items(self, split: str, rows: "Dataset") -> "Dataset":
        tokenise = Tokenise(self.tokenizer, self.text, self.text_pair, self.max_length)
        tokens = tokenised(rows, tokenise)
        if split == "predict":
            return tokens
        return tokens.add_column("labels", self.strata(split, rows))

    def collator(self) -> Callable[[Any], Any]:
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(self.tokenizer)

    def inputs(self, split: str) -> list[str]:
        columns = [map(str, self.chosen(split)[column]) for column in self._texts()]
        return [" / ".join(texts) for texts in zip(*columns, strict=True)]

    def targets(self, split: str) -> list[str]:
        return [self.labels[number] for number in self.strata(split, self.chosen(split))]

    def _texts(self) -> list[str]:
        return [self.text] if self.text_pair is None else [self.text, self.text_pair]

    def _know(self, labels: Sequence[str]) -> None:
        self._labels = tuple(labels)

    def _check_settings(self) -> None:
        if self.max_length < 1:
            raise ConfigError(f"`max_length` must be at least 1, but is {self.max_length} instead.")
        if self._labels is not None and len(set(self._labels)) < max(2, len(self._labels)):
            raise ConfigError(
                f"`labels` must be two or more different names, but is {self._labels} instead."
            )
