"""Adapters for several markets from the command line: one run, then new rows of each market."""

import csv
import json
from pathlib import Path

import pytest

from lightning_peft.models import package_folder
from tests.jobs.command import GOOD, Command, Run
from tests.jobs.test_runs import command
from tests.tasks.test_markets import write


@pytest.fixture(scope="module")
def fitted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Command]:
    folder = tmp_path_factory.mktemp("markets")
    write(folder / "train.csv", 64)
    write(folder / "test.csv", 20)
    done = command(
        "task=markets",
        "data=markets",
        "model=hf",
        f"model.name={tiny_model}",
        f"data.path={{train: {folder / 'train.csv'}, test: {folder / 'test.csv'}}}",
        "data.rows.max_length=8",
        "data.rows.batch_size=8",
        "optimizer.lr=0.02",
        "trainer.max_epochs=2",
        "folder=run",
        cwd=folder,
    )
    return folder / "run", done


def test_the_report_tells_the_markets_apart(fitted: tuple[Path, Command]) -> None:
    folder, done = fitted
    assert done.code == 0, done.err
    for noise in ("Warning", "Traceback"):
        assert noise not in done.out + done.err
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    *baselines, own = report["results"]
    assert set(report["per_class"]) == {"far south", "north"}
    assert all("accuracy" in one["test"] for one in baselines)
    for market, row in report["per_class"].items():
        assert row == {kind: own["test"][f"{kind}_{market}"] for kind in ("accuracy", "f1")}
    assert sorted(p.name for p in (folder / "adapter").iterdir()) == ["far-south", "north"]


def test_new_rows_go_to_the_adapter_of_their_market(
    fitted: tuple[Path, Command], run: Run, tmp_path: Path
) -> None:
    rows = [{"text": f"{GOOD[0]} tea", "market": market} for market in ("far south", "north")]
    Path("new.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    settings = [f"data.path={tmp_path / 'new.jsonl'}", "job.output=new.csv"]
    done = run("job=predict", f"run={fitted[0]}", *settings)
    assert done.code == 0, done.err
    with Path("new.csv").open(encoding="utf-8", newline="") as file:
        found = [(row["market"], row["adapter"]) for row in csv.DictReader(file)]
    assert found == [("far south", "far-south"), ("north", "north")]

    rows[1]["market"] = "nort"
    Path("bad.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    done = run("job=predict", f"run={fitted[0]}", f"data.path={tmp_path / 'bad.jsonl'}")
    assert done.code == 1
    assert "`market` must be one of far south, north, but is 'nort' in row 2 of" in done.err
    assert "Did you mean `north`?" in done.err


def test_a_run_is_scored_by_market(fitted: tuple[Path, Command], run: Run) -> None:
    done = run("job=test", f"run={fitted[0]}")
    assert done.code == 0, done.err
    kept = json.loads((fitted[0] / "test.json").read_text(encoding="utf-8"))
    report = json.loads((fitted[0] / "report.json").read_text(encoding="utf-8"))
    assert kept["per_class"] == report["per_class"]


@pytest.mark.skipif(package_folder("recbole") is None, reason="run `make recipe-assets`")
def test_movielens_has_each_rating_once() -> None:
    from lightning_peft.data.movielens import REGIONS, read_movielens

    splits = {name: rows.to_list() for name, rows in read_movielens().items()}
    pairs = {name: {(r["user"], r["item"]) for r in rows} for name, rows in splits.items()}
    assert not pairs["train"] & pairs["test"]
    assert len(pairs["train"]) + len(pairs["test"]) == sum(map(len, splits.values()))
    assert {row["market"] for row in splits["train"]} == set(REGIONS.values())
    assert splits["test"][0].keys() == {"text", "label", "market", "user", "item"}
