"""`job=predict job.adapters=[...]`: what several adapters say of the same rows."""

import csv
import shutil
from pathlib import Path

import pytest

from lightning_peft.errors import ConfigError
from lightning_peft.jobs.beside import by_name
from tests.jobs.command import Run


def test_columns_of_another_adapter_stand_beside_the_runs(
    small: list[str], files: Path, run: Run
) -> None:
    assert run(*small, "folder=one", "trainer.max_epochs=1").code == 0
    shutil.copytree("one/adapter", "again")
    settings = ["job.adapters=[again]", "job.output=both.csv"]
    done = run("job=predict", "run=one", f"data.path={files / 'new.csv'}", *settings)
    assert done.code == 0, done.err
    with Path("both.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    for row in rows:
        assert row["again_label"] == row["label"]
        assert float(row["again_probability_good"]) == pytest.approx(float(row["probability_good"]))


def test_names_of_folders(tmp_path: Path) -> None:
    given = [str(tmp_path / "runs" / "x y" / "adapter"), str(tmp_path / "other")]
    assert list(by_name(given, "default")) == ["x-y", "other"]
    for taken in (["a/other", "b/other"], ["default"]):
        with pytest.raises(ConfigError, match="names of their own"):
            by_name(taken, "default")


def test_an_adapter_of_other_labels_is_refused(small: list[str], files: Path, run: Run) -> None:
    assert run(*small, "folder=one", "trainer.max_epochs=1").code == 0
    shutil.copytree("one/adapter", "again")
    sidecar = Path("again/lightning_peft.json")
    text = sidecar.read_text(encoding="utf-8")
    assert '"good"' in text
    sidecar.write_text(text.replace('"good"', '"sports"'), encoding="utf-8")
    done = run("job=predict", "run=one", f"data.path={files / 'new.csv'}", "job.adapters=[again]")
    assert done.code == 1
    assert "must name adapters that tell" in done.err
    assert "sports" in done.err
