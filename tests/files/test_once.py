"""Folders that are built once, by one of the processes that ask for them."""

import multiprocessing
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from lightning_peft.files.once import built_once

SHARDED = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("names", [("model.safetensors",), SHARDED])
def test_a_folder_is_built_the_first_time_alone(names):
    def build(folder: Path) -> None:
        built.append(folder)
        for name in names:
            (folder / name).write_text("weights")

    built: list[Path] = []
    folder = built_once("test", "0" * 64, build)
    assert built_once("test", "0" * 64, build) == folder
    assert len(built) == 1
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_what_fails_leaves_nothing_behind():
    def fail(folder: Path) -> None:
        (folder / "model.safetensors").write_text("half")
        raise RuntimeError("no space")

    with pytest.raises(RuntimeError, match="no space"):
        built_once("test", "1" * 64, fail)
    folder = built_once("test", "1" * 64, lambda f: (f / "a.safetensors").touch())
    assert [path.name for path in folder.iterdir()] == ["a.safetensors"]


def _slowly(folder: Path) -> None:
    with (folder.parents[2] / "built").open("a") as told:
        told.write("x")
    time.sleep(0.5)
    (folder / "model.safetensors").write_text("weights")


def _ask() -> None:
    assert (built_once("test", "2" * 64, _slowly) / "model.safetensors").read_text() == "weights"


def test_of_several_processes_one_builds(cache):
    several = multiprocessing.get_context("fork")
    processes = [several.Process(target=_ask) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [path.read_text() for path in cache.rglob("built")] == ["x"]
