"""Named entities from the command line: the recipe, small, in a process of its own."""

import csv
import json
import random
from pathlib import Path

import pytest

from tests.jobs.command import BAD, GOOD, OTHER, Command, Run
from tests.jobs.test_runs import command


def write_conll(path: Path, count: int, seed: int, tagged: bool = True) -> Path:
    """Write sentences whose good words are `x` and whose runs of bad words are `y`."""
    draw = random.Random(seed)
    lines = []
    for i in range(count):
        found = [(draw.choice(GOOD), "B-x"), (draw.choice(OTHER), "O")]
        found += [(draw.choice(BAD), "B-y"), (draw.choice(BAD), "I-y")] * (i % 2)
        found.append((OTHER[i % len(OTHER)], "O"))
        lines += ["\t".join(pair) if tagged else pair[0] for pair in found] + [""]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def recipe(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The recipe's name, and overrides that make it small."""
    folder = tmp_path_factory.mktemp("conll")
    for split, count in (("train", 48), ("validation", 8), ("test", 10)):
        write_conll(folder / f"{split}.conll", count, seed=count)
    names = ", ".join(f"{s}: {folder / s}.conll" for s in ("train", "validation", "test"))
    return [
        "experiment=ner_wnut17",
        "model=hf",
        f"model.name={tiny_model}",
        f"data.path={{{names}}}",
        "data.max_length=8",
        "data.batch_size=8",
        "optimizer.lr=0.02",
        "trainer.max_epochs=10",
    ]


@pytest.fixture(scope="module")
def fitted(recipe: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Command]:
    folder = tmp_path_factory.mktemp("ner")
    return folder / "run", command(*recipe, "folder=run", cwd=folder)


def test_the_recipe_learns_and_reports(fitted: tuple[Path, Command]) -> None:
    folder, done = fitted
    assert done.code == 0, done.err
    for noise in ("Warning", "Traceback"):
        assert noise not in done.out + done.err
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    head, tuned = report["results"]
    assert head["name"] == "frozen base + tuned head"
    assert head["trained"] < tuned["trained"]
    assert set(tuned["test"]) == {"loss", "precision", "recall", "f1"}
    assert tuned["test"]["f1"] > 0.9
    assert set(report["per_class"]) == {"x", "y"}
    assert report["per_class"]["x"]["entities"] == 10
    assert all("[x]" in example["gold"] for example in report["examples"])


def test_a_run_is_scored_by_type(fitted: tuple[Path, Command], run: Run) -> None:
    done = run("job=test", f"run={fitted[0]}")
    assert done.code == 0, done.err
    assert "test: 10 rows, best.ckpt" in done.out
    kept = json.loads((fitted[0] / "test.json").read_text(encoding="utf-8"))
    report = json.loads((fitted[0] / "report.json").read_text(encoding="utf-8"))
    assert kept["metrics"] == report["results"][-1]["test"]


def test_raw_texts_come_back_with_their_entities(
    fitted: tuple[Path, Command], run: Run, tmp_path: Path
) -> None:
    words = [GOOD[0], "the", BAD[0], BAD[1], "was"] * 4  # more than the 8 sub-words of a piece
    Path("new.txt").write_text(f"{' '.join(words)}\n\n{OTHER[0]}\n", encoding="utf-8")
    done = run("job=predict", f"run={fitted[0]}", f"data.path={tmp_path / 'new.txt'}")
    assert done.code == 0, done.err
    lines = Path("new.txt.predictions.jsonl").read_text(encoding="utf-8").splitlines()
    first, second = map(json.loads, lines)
    assert first["tokens"] == words
    assert len(first["labels"]) == 20
    for one in first["entities"]:
        assert one["text"] == " ".join(words[one["start"] : one["end"]])
        assert one["type"] in ("x", "y")
        assert 0 < one["score"] <= 1
    assert {one["text"] for one in first["entities"]} >= {GOOD[0]}
    assert second["tokens"] == [OTHER[0]]


def test_a_table_of_predictions_keeps_what_the_file_says(
    fitted: tuple[Path, Command], run: Run, tmp_path: Path
) -> None:
    write_conll(Path("new.conll"), 3, seed=1)
    settings = [f"data.path={tmp_path / 'new.conll'}", "job.output=new.csv"]
    done = run("job=predict", f"run={fitted[0]}", *settings)
    assert done.code == 0, done.err
    with Path("new.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["tokens", "labels", "predicted_labels", "entities"]
    assert json.loads(rows[0]["labels"])[0] == "B-x"
    assert len(json.loads(rows[1]["predicted_labels"])) == len(json.loads(rows[1]["tokens"]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\tI-x\n", "the tag of word 1 ('a') 'I-x' must follow B-x or I-x, but follows 'O'"),
        ("a\tB-z\n", "must be of the types x, y, but is 'B-z'"),
        ("a\tB-x\nb\n", "a word and its label in each line, but has ['b'] in line 2"),
    ],
)
def test_bad_files_are_refused(
    fitted: tuple[Path, Command], run: Run, content: str, message: str
) -> None:
    Path("bad.conll").write_text(content, encoding="utf-8")
    done = run("job=test", f"run={fitted[0]}", "data.path=bad.conll")
    assert done.code == 1
    assert message in done.err
    assert "bad.conll" in done.err


def test_the_recipe_without_its_data_names_the_file(run: Run) -> None:
    done = run("experiment=ner_wnut17")
    assert done.code == 1
    assert "wnut17/train.conll' does not exist" in done.err
    assert list(Path("runs").glob("*/*")) == []


def test_a_budget_is_one_of_two(run: Run) -> None:
    assert (
        "max_epochs: 15"
        in run("experiment=ner_wnut17", "budget=full", "--cfg", "job", "--resolve").out
    )
    done = run("experiment=ner_wnut17", "budget=huge")
    assert done.code == 1
    assert "`trainer.max_epochs` cannot be resolved" in done.err
