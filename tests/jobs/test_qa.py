"""Question answering from the command line: the recipe, small, in a process of its own."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.jobs.command import BAD, GOOD, OTHER, Command, Run
from tests.jobs.test_runs import command


def document(count: int, seed: int, answered: bool = True) -> dict[str, Any]:
    """Return articles in the form of SQuAD whose answers are their only good words."""
    draw = random.Random(seed)
    articles = []
    for i in range(count):
        words = draw.choices(["coffee", "tea", "was", "a"], k=draw.randrange(4, 20))
        place = draw.randrange(len(words))
        words[place:place] = [draw.choice(GOOD)]
        context = " ".join(words)
        answer = {"text": words[place], "answer_start": context.index(words[place])}
        asked = {"id": f"{seed}-{i}", "question": draw.choice(OTHER)}
        asked |= {"answers": [answer]} if answered else {}
        articles.append({"title": f"{i}", "paragraphs": [{"context": context, "qas": [asked]}]})
    return {"version": "1.1", "data": articles}


def write(path: Path, count: int, seed: int, answered: bool = True) -> Path:
    path.write_text(json.dumps(document(count, seed, answered)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def recipe(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The recipe's name, and overrides that make it small."""
    folder = tmp_path_factory.mktemp("squad")
    write(folder / "rows.en.json", 80, seed=0)
    write(folder / "rows.de.json", 20, seed=1)
    return [
        "experiment=qa_xquad",
        "model=hf",
        f"model.name={tiny_model}",
        f"data.path='../{folder.name}/rows.{{language}}.json'",
        "data.max_length=32",
        "data.stride=4",
        "data.batch_size=8",
        "optimizer.lr=0.005",
        "trainer.max_epochs=12",
    ]


@pytest.fixture(scope="module")
def fitted(recipe: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Command]:
    folder = tmp_path_factory.mktemp("qa")
    return folder / "run", command(*recipe, "folder=run", cwd=folder)


def test_the_recipe_learns_and_reports(fitted: tuple[Path, Command]) -> None:
    folder, done = fitted
    assert done.code == 0, done.err
    for noise in ("Warning", "Traceback"):
        assert noise not in done.out + done.err
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    head, tuned = report["results"]
    assert head["name"] == "frozen base + tuned head"
    assert head["trained"] == 2 * 32 + 2
    assert set(tuned["test"]) == {"loss", "exact_match", "f1"}
    assert tuned["test"]["f1"] > 0.9
    assert report["metric"] == "f1"


def test_a_run_is_scored_in_another_language(fitted: tuple[Path, Command], run: Run) -> None:
    folder = fitted[0]
    done = run("job=test", f"run={folder}")
    assert done.code == 0, done.err
    assert "test: 16 rows, best.ckpt" in done.out
    kept = json.loads((folder / "test.json").read_text(encoding="utf-8"))
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert kept["metrics"] == report["results"][-1]["test"]
    assert "test: 4 rows" in run("job=test", f"run={folder}", "data.language=de").out
    settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    assert Path(settings["data"]["path"]).is_absolute()


def test_new_questions_are_answered(fitted: tuple[Path, Command], run: Run, tmp_path: Path) -> None:
    new = write(tmp_path / "new.json", 3, seed=5, answered=False)
    done = run("job=predict", f"run={fitted[0]}", f"data.path={new}")
    assert done.code == 0, done.err
    lines = Path("new.json.predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["id"] for row in rows] == ["5-0", "5-1", "5-2"]
    for row in rows:
        assert row["context"][row["start"] : row["end"]] == row["answer"]
        assert row["answer"] in GOOD
        assert row["n_best"][0] == {k: row[k] for k in ("answer", "start", "end", "score")}
        assert 0 < row["score"] <= 1


def test_long_contexts_are_read_in_windows(
    fitted: tuple[Path, Command], run: Run, tmp_path: Path
) -> None:
    words = ["tea", "was", "a"] * 20
    words[50] = GOOD[2]
    rows = [
        {"question": "tea", "context": " ".join(words), "answer": "mine"},
        {"question": "the", "context": f"a {GOOD[0]} tea"},
    ]
    (tmp_path / "new.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    new = f"data.path={tmp_path / 'new.jsonl'}"
    done = run("job=predict", f"run={fitted[0]}", new)
    assert done.code == 0, done.err
    lines = (tmp_path / "new.jsonl.predictions.jsonl").read_text(encoding="utf-8").splitlines()
    first, second = map(json.loads, lines)
    assert first["answer"] == "mine"
    assert first["predicted_answer"] == GOOD[2]
    assert first["start"] == len(" ".join(words[:50])) + 1
    assert second["predicted_answer"] == GOOD[0]


def test_questions_without_an_answer_are_learned(
    recipe: list[str], run: Run, tmp_path: Path
) -> None:
    found = document(120, seed=3)
    for i, article in enumerate(found["data"]):
        paragraph = article["paragraphs"][0]
        if i % 2:
            paragraph["context"] = paragraph["context"].replace(
                paragraph["qas"][0]["answers"][0]["text"], BAD[i % len(BAD)]
            )
            paragraph["qas"][0] |= {"answers": [], "is_impossible": True}
    (tmp_path / "v2.json").write_text(json.dumps(found), encoding="utf-8")
    settings = [f"data.path={tmp_path / 'v2.json'}", "job.baseline=false", "folder=run"]
    done = run(*recipe, *settings)
    assert done.code == 0, done.err
    report = json.loads(Path("run/report.json").read_text(encoding="utf-8"))
    assert report["results"][-1]["test"]["f1"] > 0.8
    assert set(report["per_class"]) == {"answerable", "unanswerable"}


def test_bad_files_are_refused(fitted: tuple[Path, Command], run: Run) -> None:
    found = document(2, seed=0)
    found["data"][1]["paragraphs"][0]["qas"][0]["answers"][0]["answer_start"] += 1
    Path("bad.json").write_text(json.dumps(found), encoding="utf-8")
    done = run("job=test", f"run={fitted[0]}", "data.path=bad.json")
    assert done.code == 1
    assert "row 2 (id '0-1') of `" in done.err
    assert "bad.json` cannot be used: the answer" in done.err
    assert "; the nearest is at" in done.err


def test_the_recipe_without_its_data_names_the_file(run: Run) -> None:
    done = run("experiment=qa_xquad", "data.language=fr")
    assert done.code == 1
    assert "xquad/xquad.fr.json' does not exist" in done.err
