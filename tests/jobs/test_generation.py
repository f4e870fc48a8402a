"""Translation and summaries from the command line: the recipe, small, in a process of its own."""

import gzip
import json
import random
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.jobs.command import Command, Run
from tests.jobs.test_runs import command

COLOURS = {"red": "rouge", "blue": "bleu", "green": "vert", "black": "noir", "white": "blanc"}


def sentences(count: int, seed: int) -> tuple[str, str]:
    draw = random.Random(seed)
    words = [draw.choices(list(COLOURS), k=2 + i % 3) for i in range(count)]
    source = "".join(f"a {' '.join(row)} {i} car\n" for i, row in enumerate(words, seed * 1000))
    target = "".join(f"une {' '.join(COLOURS[w] for w in row)} voiture\n" for row in words)
    return source, target


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The recipe's name, and overrides that make it and its base small."""
    folder = tmp_path_factory.mktemp("parallel")
    splits = {}
    for seed, (split, count) in enumerate((("train", 48), ("validation", 6), ("test", 10))):
        for side, text in zip(("source", "target"), sentences(count, seed), strict=True):
            (folder / f"{split}.{side}.gz").write_bytes(gzip.compress(text.encode()))
        splits[split] = (
            f"{{source: {folder / f'{split}.source.gz'}, target: {folder / f'{split}.target.gz'}}}"
        )
    data = f"{{train: {splits['train']}, validation: {splits['validation']}"
    base = {"vocabulary": 300, "d_model": 16, "d_ff": 16, "layers": 1, "heads": 2, "epochs": 1}
    return [
        "experiment=translation_multi30k",
        f"model.trained.path={data}}}",
        *(f"model.trained.{name}={value}" for name, value in base.items()),
        f"data.path={data}, test: {splits['test']}}}",
        "data.batch_size=8",
        "task.max_new_tokens=8",
        "task.samples=4",
        "trainer.max_epochs=1",
    ]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def own_cache(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the base that is trained out of the user's cache."""
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", cache)


@pytest.fixture(scope="module")
def fitted(
    recipe: list[str], cache: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Command]:
    folder = tmp_path_factory.mktemp("fitted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ASSETS_CACHE", cache)  # which the other process reads
        done = command(*recipe, "folder=run", cwd=folder.parent)
    assert done.code == 0, done.err
    return folder, done


def test_the_recipe_trains_its_base_once_and_reports_generated_scores(
    fitted: tuple[Path, Command], cache: str
) -> None:
    folder, _ = fitted
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert report["metric"] == "bleu"
    assert [one["name"] for one in report["results"]] == ["untouched base", "lora"]
    for one in report["results"]:
        assert set(one["test"]) >= {"bleu", "chrf", "accuracy"}
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    (base,) = Path(cache).glob("lightning-peft/translator/*")
    assert (base / "tokenizer.json").is_file()
    assert json.loads((base / "training.json").read_text(encoding="utf-8"))["epochs"] == 1


def test_a_run_is_judged_again_on_other_files(fitted: tuple[Path, Command], run: Run) -> None:
    for side, text in zip(("source", "target"), sentences(3, 7), strict=True):
        Path(f"more.{side}").write_text(text, encoding="utf-8")
    more = "{test: {source: more.source, target: more.target}}"
    done = run("job=test", f"run={fitted[0]}", f"data.path={more}")
    assert done.code == 0, done.err
    assert "3 rows" in done.out
    assert "bleu" in done.out


def test_predictions_stand_beside_their_texts(fitted: tuple[Path, Command], run: Run) -> None:
    Path("new.en").write_text("a red car\na black white car\n", encoding="utf-8")
    done = run("job=predict", f"run={fitted[0]}", "data.path=new.en")
    assert done.code == 0, done.err
    lines = Path("new.en.predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["source"] for row in rows] == ["a red car", "a black white car"]
    assert all(isinstance(row["text"], str) for row in rows)


def test_bad_parallel_files_are_refused(fitted: tuple[Path, Command], run: Run) -> None:
    Path("a.en").write_text("one\ntwo\n", encoding="utf-8")
    Path("a.fr").write_text("un\n", encoding="utf-8")
    bad = "data.path={test: {source: a.en, target: a.fr}}"
    done = run("job=test", f"run={fitted[0]}", bad)
    assert done.code == 1
    assert "a.en` has 2 and" in done.err
    assert "a.fr` has 1" in done.err
    Path("a.fr").write_text("un\n\n", encoding="utf-8")
    done = run("job=test", f"run={fitted[0]}", bad)
    assert done.code == 1
    assert "`target` must be a text in every row" in done.err
    assert "row 2" in done.err


def test_a_recipe_without_its_data_names_the_file(run: Run) -> None:
    done = run("experiment=translation_multi30k")
    assert done.code == 1
    assert "multi30k/train.en.gz' does not exist" in done.err
