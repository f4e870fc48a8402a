"""Texts with several labels from the command line."""

import csv
import json
import random
from pathlib import Path

import pytest

from tests.jobs.command import BAD, GOOD, OTHER, Run


def write(path: Path, count: int, seed: int) -> Path:
    """Write texts that have `nice` and `nasty` where they hold such words: both, one, or none."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "labels"])
        for i in range(count):
            words = [*draw.choices(OTHER, k=2)]
            words += [draw.choice(GOOD)] * (i % 2) + [draw.choice(BAD)] * (i // 2 % 2)
            names = ["nice"] * (i % 2) + ["nasty"] * (i // 2 % 2)
            writer.writerow([" ".join(words), "|".join(names)])
    return path


@pytest.fixture
def settings(tiny_model: Path, tmp_path: Path) -> list[str]:
    files = {split: write(tmp_path / f"{split}.csv", n, n) for split, n in SIZES.items()}
    return [
        "task=multi_label",
        "data=multi_label",
        f"data.path={{{', '.join(f'{split}: {file}' for split, file in files.items())}}}",
        "data.separator='|'",
        "data.max_length=32",
        "data.batch_size=8",
        "model=hf",
        f"model.name={tiny_model}",
        "trainer.max_epochs=10",
        "optimizer.lr=0.02",
    ]


SIZES = {"train": 64, "validation": 12, "test": 16}


def test_a_run_learns_both_labels_and_predicts(settings: list[str], run: Run) -> None:
    done = run(*settings, "folder=run")
    assert done.code == 0, done.err
    report = json.loads(Path("run", "report.json").read_text(encoding="utf-8"))
    head, tuned = report["results"]
    assert head["name"] == "frozen base + tuned head"
    assert set(tuned["test"]) == {"loss", "f1", "f1_macro", "exact"}
    assert tuned["test"]["f1"] > 0.8
    assert set(report["per_class"]) == {"nice", "nasty"}
    assert report["per_class"]["nice"]["texts"] == 8
    Path("new.txt").write_text(f"{GOOD[0]} {BAD[0]} the\n", encoding="utf-8")
    done = run("job=predict", "run=run", "data.path=new.txt")
    assert done.code == 0, done.err
    with Path("new.txt.predictions.csv").open(encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert list(row) == ["text", "labels", "probability_nasty", "probability_nice"]
    chosen = [n for n in ("nasty", "nice") if float(row[f"probability_{n}"]) >= 0.5]
    assert json.loads(row["labels"]) == chosen


def test_few_shots_and_balanced_weights(small: list[str], run: Run) -> None:
    settings = ["data.shots=4", "task.class_weights=balanced", "job.baseline=false"]
    done = run(*small, *settings, "folder=few", "trainer.max_epochs=1")
    assert done.code == 0, done.err
    import torch

    loaded = torch.load(Path("few", "checkpoints", "best.ckpt"), weights_only=True)
    weights = loaded["hyper_parameters"]["task"]["class_weights"]
    assert weights == {"bad": 1.0, "good": 1.0}
