"""The folder of a run, where several runs or several processes could meet in it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_peft.errors import ConfigError
from lightning_peft.jobs import run_folder, saved
from lightning_peft.jobs.run_folder import RunFolder, created, title

SETTINGS: dict[str, Any] = {
    "seed": 3,
    "title": None,
    "folder": None,
    "method": {"lora": {}, "freeze": {}},
    "data": {"path": None, "hub": None, "source": "reviews"},
}


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_PEFT_RUN_FOLDER", "of another run")
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"source": "reviews"}, "lora-freeze-reviews"),
        ({"path": "some/mine.csv", "source": "reviews"}, "lora-freeze-mine"),
        ({"path": {"train": "a/b.tsv", "test": "c.tsv"}}, "lora-freeze-b"),
        ({"hub": "org/imdb"}, "lora-freeze-imdb"),
        ({}, "lora-freeze-data"),
    ],
)
def test_a_title_says_what_and_on_what(data: dict[str, Any], expected: str) -> None:
    assert title({**SETTINGS, "data": data}) == expected
    assert title({**SETTINGS, "data": data, "title": "mine"}) == "mine"


def test_runs_of_the_same_second_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "_new_name", lambda settings: Path("runs/now"))
    folders = []
    for _ in range(3):
        with created(SETTINGS) as run:
            folders.append(str(run.path))
    assert folders == ["runs/now", "runs/now-2", "runs/now-3"]


def test_a_folder_with_odd_letters_is_a_plain_one() -> None:
    with created({**SETTINGS, "title": "a/b: c*"}) as run:
        assert run.path.name.endswith("-a_b__c_")
        assert run.path.parent == Path("runs")


def fail_after(keep: Callable[[RunFolder], Any]) -> None:
    with created({**SETTINGS, "folder": "run"}) as run:
        keep(run)
        raise ZeroDivisionError


def test_a_failure_before_anything_was_kept_leaves_nothing() -> None:
    with pytest.raises(ZeroDivisionError):
        fail_after(lambda run: (run.path / "wandb_run_id").write_text("x"))
    assert not Path("run").exists()


def test_a_failure_afterwards_leaves_everything() -> None:
    with pytest.raises(ZeroDivisionError):
        fail_after(lambda run: run.describe(SETTINGS))
    assert sorted(p.name for p in Path("run").iterdir()) == ["config.yaml", "environment.json"]


def test_a_place_that_cannot_be_written_is_named() -> None:
    Path("file").write_text("not a folder", encoding="utf-8")
    with (
        pytest.raises(ConfigError, match="`folder` cannot be made"),
        created({**SETTINGS, "folder": "file/run"}),
    ):
        pass


def test_processes_of_torchrun_need_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="`folder` must be given"), created(SETTINGS):
        pass
    assert not Path("runs").exists()
    with created({**SETTINGS, "folder": "run"}) as run:
        assert run.path == Path("run")


def test_a_second_description_keeps_the_first() -> None:
    run = RunFolder(Path())
    for seed in (1, 2, 3):
        run.describe({**SETTINGS, "seed": seed})
    files = ["environment.1.json", "environment.2.json", "environment.json"]
    assert [json.loads(Path(f).read_text())["seed"] for f in files] == [1, 2, 3]


@pytest.mark.parametrize("override", ["run=runs/a", "+run=runs/a", "++run='runs/a'"])
def test_a_run_is_recognised_however_it_is_written(override: str) -> None:
    assert saved.requested(["seed=1", override]) == Path("runs/a")
    assert saved.requested([override, "run=null"]) is None
