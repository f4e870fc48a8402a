"""Rows of several markets, each of which has an adapter of its own."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, cast

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_peft.config import TARGET, Unbuilt, instantiate_as
from lightning_peft.data.rows import RowData
from lightning_peft.data.sharing import shared_order, shared_rows
from lightning_peft.errors import ConfigError, DataError, near_misses

if TYPE_CHECKING:
    from datasets import Dataset as Table

MARKET = "row_market"
"""Name in a batch of the numbers of the rows' markets, `(rows,)`."""

_REFUSED = {
    "streaming": "whose rows are counted.",
    "by_length": "whose shares decide on the batches.",
}

_ROWS: Mapping[str, Any] = {TARGET: "lightning_peft.data.classification.ClassificationData"}


class MarketData(pl.LightningDataModule):
    """Rows of any task with a column that says which market each is of.

    Reading, checks, splits and what the model gets are those of the task's own data module, which
    `rows` describes. A batch has `row_market` beside, the number of each row's market.

    Example:
        >>> data = MarketData(path={"train": "train.csv", "test": "test.csv"}, market="country")
        >>> data.markets
        ('de', 'fr')

    Args:
        path: One file or files by split, see `Origin`.
        source: Data that a package carries: `movielens`.
        market: Column of the markets.
        markets: Their names in order; None takes those of the training rows, sorted.
        temperature: What a market of n rows is drawn by is n^(1/temperature): 1 by its size, more
            evens out, and with `.inf` all markets have equally many rows in an epoch. An epoch has
            as many rows in all cases.
        in_turn: Whether a batch has rows of one market alone, the markets in random turn; else
            of any.
        rows: The data module of the task and its settings, `path` and `source` aside.

    Raises:
        ConfigError: A setting is out of its range.
    """

    def __init__(
        self,
        *,
        path: str | Mapping[str, str] | None = None,
        source: str | None = None,
        market: str = "market",
        markets: Sequence[str] | None = None,
        temperature: float = 1.0,
        in_turn: bool = False,
        rows: Unbuilt = _ROWS,
    ) -> None:
        super().__init__()
        if not temperature >= 1:
            raise ConfigError(f"`temperature` must be 1 or more, but is {temperature} instead.")
        place = {"path": path, "source": source}
        given = {name: value for name, value in place.items() if value is not None}
        self.rows: RowData = instantiate_as(RowData, {**rows, **given}, "data.rows")  # type: ignore[type-abstract]
        for name, reason in _REFUSED.items():
            if getattr(self.rows.loading, name):
                raise ConfigError(f"`data.rows.{name}` must be false for several markets, {reason}")
        self.rows.also = self
        self.market, self.temperature, self.in_turn = market, temperature, in_turn
        self._markets = tuple(markets) if markets is not None else None

    def connect(self, markets: Sequence[str] | None) -> Self:
        """Take the markets of adapters that are already trained."""
        self._markets = tuple(markets) if markets is not None else self._markets
        return self

    @property
    def markets(self) -> tuple[str, ...]:
        """The names of the markets; reads the training rows if need be."""
        if self._markets is None:
            self._markets = tuple(sorted(set(map(str, self.rows.table("train")[self.market][:]))))
        return self._markets

    def columns(self, split: str, rows: "Table") -> dict[str, str | None]:
        """Return the column that rows must have beside those of the task."""
        return {"market": self.market}

    def problems(self, split: str, rows: "Table", number: Callable[[int], int]) -> dict[int, str]:
        """Return which rows are of no market, or of one without an adapter."""
        origin, bad = self.rows.origin.name(split), {}
        known = self._markets if split == "train" else self.markets
        for i, value in enumerate(rows[self.market][:]):
            place = f"row {number(i):,} of {origin}"
            if value is None or not str(value).strip():
                bad[i] = f"`{self.market}` must be given in every row, but is missing in {place}."
            elif known is not None and str(value) not in known:
                bad[i] = (
                    f"`{self.market}` must be one of {', '.join(known)}, but is {value!r} in "
                    f"{place}.{near_misses(str(value), known)}"
                )
        return bad

    def numbers(self, split: str) -> list[int]:
        """Return the number of the market of each row of a split."""
        places = {name: i for i, name in enumerate(self.markets)}
        return [places[str(name)] for name in self.rows.chosen(split)[self.market][:]]

    def has_split(self, split: str) -> bool:
        """Whether there are rows for `split`: train, validation, test or predict."""
        return self.rows.has_split(split)

    def inputs(self, split: str) -> list[Any]:
        """Return what the model reads of each row of a split, as a person knows it."""
        return self.rows.inputs(split)

    def targets(self, split: str) -> list[Any]:
        """Return what is right for each row of a split."""
        return self.rows.targets(split)

    def predict_rows(self) -> list[dict[str, Any]]:
        """Return the rows to predict as they were read, in the order of the predictions."""
        return self.rows.predict_rows()

    def prepare_data(self) -> None:
        """Download a data set of the hub."""
        self.rows.prepare_data()

    def setup(self, stage: str) -> None:
        """Read, check and split what the stage needs.

        Raises:
            DataError: A row is not as it must be, or a market has no training rows.
        """
        self.rows.setup(stage)
        if stage == "fit":
            counts = Counter(self.numbers("train"))
            if empty := [name for i, name in enumerate(self.markets) if not counts[i]]:
                raise DataError(
                    f"`data.markets` must have training rows each, but `{empty[0]}` has none: add "
                    f"rows, leave it out of `data.markets`, or raise `data.rows.limit`."
                )

    def train_dataloader(self) -> Any:
        seed = self.rows.choice.seed
        size = self.rows.batch_size
        order = ByMarket(self.numbers("train"), size, seed, self.temperature, self.in_turn)
        return shared_order(self._loader("train", order))

    def val_dataloader(self) -> Any:
        return shared_rows(self._loader("validation"))

    def test_dataloader(self) -> Any:
        return shared_rows(self._loader("test"))

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader("predict")

    def _loader(self, split: str, order: "ByMarket | None" = None) -> DataLoader[Any]:
        items, markets = self.rows.items(split, self.rows.chosen(split)), self.numbers(split)
        if len(items) != len(markets):
            raise ConfigError(
                f"`data.rows` must keep rows of several markets apart, but makes {len(items):,} of "
                f"{len(markets):,}: set `data.rows.pack=false`."
            )
        return DataLoader(
            _Paired(items, markets),
            batch_size=self.rows.batch_size,
            sampler=order,
            collate_fn=_Collator(self.rows.collator()),
            num_workers=self.rows.loading.num_workers,
            persistent_workers=self.rows.loading.num_workers > 0,
        )


class ByMarket(Sampler[int]):
    """Row numbers in a random order, with the share that a temperature gives to each market.

    The order follows from `seed` and the epoch, which the Trainer tells, so that a resumed run and
    every process of a run have the same one.

    Args:
        markets: The number of each row's market.
        batch_size: Rows in a batch.
        seed: Seed of the order.
        temperature: 1 takes each row once; more evens the markets out.
        in_turn: Whether all rows of a batch are of one market: each market has whole batches then,
            the last one filled up with further rows of it.
    """

    def __init__(
        self,
        markets: Sequence[int],
        batch_size: int,
        seed: int,
        temperature: float = 1.0,
        in_turn: bool = False,
    ) -> None:
        self.rows: dict[int, list[int]] = {}
        for row, market in enumerate(markets):
            self.rows.setdefault(market, []).append(row)
        self.batch_size, self.seed, self.in_turn, self.epoch = batch_size, seed, in_turn, 0
        self.counts = _shares({m: len(r) for m, r in self.rows.items()}, temperature)
        if in_turn:
            whole = {m: math.ceil(count / batch_size) for m, count in self.counts.items()}
            self.counts = {market: batches * batch_size for market, batches in whole.items()}

    def set_epoch(self, epoch: int) -> None:
        """Take the number of the epoch that begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.counts.values())

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        drawn = [_drawn(self.rows[m], count, generator) for m, count in self.counts.items()]
        size = self.batch_size if self.in_turn else 1
        parts = [rows[i : i + size] for rows in drawn for i in range(0, len(rows), size)]
        for i in torch.randperm(len(parts), generator=generator).tolist():
            yield from parts[i]


class _Paired(Dataset[tuple[Any, int]]):
    """Items of a task beside the numbers of their markets."""

    def __init__(self, items: Any, markets: Sequence[int]) -> None:
        self.items, self.markets = items, markets

    def __len__(self) -> int:
        return len(self.markets)

    def __getitem__(self, index: Any) -> Any:
        return self.items[index], self.markets[index]


class _Collator:
    """Makes a batch of a task's items, and puts the markets beside."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, pairs: list[tuple[Any, int]]) -> dict[str, Tensor]:
        items, markets = zip(*pairs, strict=True)
        return {**self.collate(list(items)), MARKET: torch.tensor(markets)}


def apart(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return the rows of a loader of several markets as their task alone knows them, in order."""
    pairs, collator = cast(_Paired, loader.dataset), cast(_Collator, loader.collate_fn)
    return DataLoader(pairs.items, batch_size=loader.batch_size, collate_fn=collator.collate)


def asked_with_markets(
    loader: DataLoader[Any],
    ask: Callable[[DataLoader[Any]], tuple[DataLoader[Any], Sequence[int] | None]],
) -> tuple[DataLoader[Any], Sequence[int] | None]:
    """Return what a task asks of a loader's rows, each beside its market, and their numbers.

    Args:
        loader: Of several markets.
        ask: The task's own, see `Task.asked`.
    """
    asked, numbers = ask(apart(loader))
    if numbers is None:
        return loader, None
    markets = cast(_Paired, loader.dataset).markets
    paired = _Paired(asked.dataset, [markets[i] for i in numbers])
    collate = _Collator(cast(Any, asked.collate_fn))
    return DataLoader(paired, batch_size=asked.batch_size, collate_fn=collate), numbers


def _shares(sizes: Mapping[int, int], temperature: float) -> dict[int, int]:
    """Return how many rows of each market an epoch has: in all as many as there are."""
    if temperature == 1:
        return dict(sizes)
    weights = {market: size ** (1 / temperature) for market, size in sizes.items()}
    per_weight = sum(sizes.values()) / sum(weights.values())
    return {market: max(1, round(weight * per_weight)) for market, weight in weights.items()}


def _drawn(rows: Sequence[int], count: int, generator: torch.Generator) -> list[int]:
    """Return `count` rows in random order, none a second time before all had their turn."""
    drawn: list[int] = []
    while len(drawn) < count:
        order = torch.randperm(len(rows), generator=generator)[: count - len(drawn)].tolist()
        drawn += [rows[i] for i in order]
    return drawn
