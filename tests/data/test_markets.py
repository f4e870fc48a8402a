"""Rows of several markets: which are drawn, in what order, and what is wrong with a column."""

from collections import Counter
from pathlib import Path

import pytest

from lightning_peft.data.markets import ByMarket, MarketData
from lightning_peft.errors import ConfigError, DataError

SIZES = [0] * 40 + [1] * 10
ROWS = {"_target_": "lightning_peft.data.classification.ClassificationData", "validation": 0.25}


def write(path: Path, markets: list[str]) -> Path:
    lines = [f"text {i},{'ab'[i % 2]},{market}" for i, market in enumerate(markets)]
    path.write_text("\n".join(["text,label,market", *lines]) + "\n", encoding="utf-8")
    return path


def test_every_row_comes_once_by_default() -> None:
    assert sorted(ByMarket(SIZES, 4, seed=0)) == list(range(50))


@pytest.mark.parametrize(("temperature", "drawn"), [(2.0, (33, 17)), (float("inf"), (25, 25))])
def test_a_temperature_evens_markets_out(temperature: float, drawn: tuple[int, int]) -> None:
    order = ByMarket(SIZES, 4, seed=0, temperature=temperature)
    rows = list(order)
    counts = Counter(SIZES[row] for row in rows)
    assert (counts[0], counts[1]) == drawn
    assert len(rows) == len(order) == 50
    again = Counter(row for row in rows if SIZES[row])
    assert max(again.values()) - min(again.values()) <= 1  # none twice before all had their turn


def test_batches_in_turn_are_of_one_market() -> None:
    order = ByMarket([0] * 10 + [1] * 6, 4, seed=0, in_turn=True)
    rows = list(order)
    assert len(rows) == len(order) == 12 + 8
    markets = [{int(row >= 10) for row in rows[i : i + 4]} for i in range(0, 20, 4)]
    assert all(len(each) == 1 for each in markets)
    assert set(rows) == set(range(16))


def test_the_order_follows_from_the_epoch_alone() -> None:
    first, second = ByMarket(SIZES, 4, seed=0), ByMarket(SIZES, 4, seed=0)
    list(first)
    first.set_epoch(3)
    second.set_epoch(3)
    assert list(first) == list(second)
    second.set_epoch(4)
    assert list(first) != list(second)


def test_each_row_has_the_number_of_its_market(tmp_path: Path) -> None:
    data = MarketData(path=str(write(tmp_path / "a.csv", ["x", "y", "y", "x"] * 4)), rows=ROWS)
    data.setup("fit")
    assert data.markets == ("x", "y")
    assert data.numbers("train") == [int(row["market"] == "y") for row in data.rows.rows("train")]


@pytest.mark.parametrize(
    ("markets", "message"),
    [
        (["x", "y", "", "x"], "`market` must be given in every row, but is missing in row 3 of"),
        (["x", "z", "y", "x"], "`market` must be one of x, y, but is 'z' in row 2 of"),
    ],
)
def test_a_row_of_no_known_market_is_named_or_left_out(
    tmp_path: Path, markets: list[str], message: str
) -> None:
    train = write(tmp_path / "train.csv", ["x", "y"] * 8)
    path = {"train": str(train), "test": str(write(tmp_path / "test.csv", markets))}
    with pytest.raises(DataError, match=message):
        MarketData(path=path, rows=ROWS).setup("test")
    data = MarketData(path=path, rows=ROWS | {"skip_bad_rows": True})
    data.setup("test")
    assert data.rows.skipped["test"] == 1
    assert len(data.numbers("test")) == len(data.inputs("test")) == 3


def test_a_market_without_training_rows_is_refused(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.csv", ["x"] * 8))
    with pytest.raises(DataError, match="must have training rows each, but `y` has none"):
        MarketData(path=path, markets=["x", "y"], rows=ROWS).setup("fit")


def test_settings_are_checked(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.csv", ["x"] * 8))
    with pytest.raises(ConfigError, match="`temperature` must be 1 or more"):
        MarketData(path=path, temperature=0.5)
    with pytest.raises(ConfigError, match=r"`data\.rows` must be a RowData"):
        MarketData(path=path, rows={"_target_": "lightning_peft.methods.LoRA"})
    with pytest.raises(DataError, match="must be a column of"):
        MarketData(path=path, market="nation", rows=ROWS).setup("fit")
