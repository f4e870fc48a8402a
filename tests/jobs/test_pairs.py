"""Pairs of texts from the command line: the second one decides the label."""

import csv
import random
from pathlib import Path

import pytest

from tests.jobs.command import BAD, GOOD, OTHER, Run


def write_pairs(path: Path, count: int, seed: int) -> Path:
    draw = random.Random(seed)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "reply", "label"])
        for i in range(count):
            asked = f"{draw.choice(GOOD + BAD)} {draw.choice(OTHER)}"
            reply = f"{draw.choice(GOOD if i % 2 else BAD)} {draw.choice(OTHER)}"
            writer.writerow([asked, reply, "yes" if i % 2 else "no"])
    return path


@pytest.fixture
def pairs(tiny_model: Path, tmp_path: Path) -> list[str]:
    train = write_pairs(tmp_path / "train.csv", 64, seed=1)
    test = write_pairs(tmp_path / "test.csv", 24, seed=2)
    return [
        "model=hf",
        f"model.name={tiny_model}",
        "data=files",
        f"data.path={{train: {train}, test: {test}}}",
        "data.text=question",
        "data.text_pair=reply",
        "data.max_length=16",
        "data.batch_size=8",
        "optimizer.lr=0.01",
        "trainer.max_epochs=8",
        "job.baseline=false",
        "folder=run",
    ]


def test_the_second_text_is_read_in_training_and_prediction(pairs: list[str], run: Run) -> None:
    done = run(*pairs)
    assert done.code == 0, done.err
    new = write_pairs(Path("new.csv").absolute(), 12, seed=3)
    done = run("job=predict", "run=run", f"data.path={new}")
    assert done.code == 0, done.err
    with Path("new.csv.predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:3] == ["question", "reply", "label"]
    right = [row["predicted_label"] == row["label"] for row in rows]
    assert sum(right) >= 11


def test_a_pair_without_its_second_text_is_told(pairs: list[str], run: Run) -> None:
    with Path("train.csv").open("a", encoding="utf-8") as file:
        file.write("coffee, ,yes\n")
    done = run(*pairs)
    assert done.code == 1
    assert "`reply` must be a text in every row" in done.err
    assert "is empty in row 65" in done.err
