from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_peft.errors import CheckpointError
from lightning_peft.files import manifest, shards
from lightning_peft.files.checkpoint_io import AtomicCheckpointIO

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def checkpoint(value: float = 1.0) -> dict[str, Any]:
    weight = torch.full((3, 2), value)
    return {
        "state_dict": {
            "a.weight": weight,
            "tied.weight": weight,
            "a sentence: no.weight": torch.empty(0),
        },
        "optimizer_states": [
            {
                "state": {
                    0: {"step": torch.tensor(7.0), "exp_avg": torch.full((3, 2), value / 2)},
                    1: {"step": torch.tensor(7.0), "momentum_buffer": None},
                },
                "param_groups": [{"lr": 0.5, "betas": (0.9, 0.99), "params": [0, 1]}],
            }
        ],
        "epoch": 3,
    }


def save(path: Path, value: float = 1.0) -> Path:
    content = checkpoint(value)
    shards.prepare(path)
    shards.write(content, path)
    shards.finish(content, path)
    assert equal(content, checkpoint(value)), "optimizers go on working with these entries"
    return path


def read(path: Path) -> dict[str, Any]:
    parameters = [torch.nn.Parameter(torch.zeros(3, 2)), torch.nn.Parameter(torch.zeros(1))]
    return shards.read(path, {"a.weight": torch.zeros(3, 2)}, [parameters])


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "last.ckpt")
    assert equal(read(path), checkpoint())
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".pt", ".sha256"}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_save_takes_the_place_of_what_was_there(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "last.ckpt"
    if kind == "folder":
        save(path, 1.0)
    else:
        AtomicCheckpointIO().save_checkpoint(checkpoint(1.0), path)
    save(path, 2.0)
    assert equal(read(path), checkpoint(2.0))


def test_a_refusing_disk_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "last.ckpt", 1.0)
    monkeypatch.setattr(manifest, "commit", raise_no_space)
    with pytest.raises(CheckpointError, match=r"last\.ckpt` could not be written.*free some space"):
        save(path, 2.0)
    assert equal(read(path), checkpoint(1.0))


def raise_no_space(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_failed_move_brings_back_what_was_there(tmp_path: Path) -> None:
    path = save(tmp_path / "last.ckpt", 1.0)
    with pytest.raises(ZeroDivisionError), shards.moved_away(path):
        raise ZeroDivisionError
    assert equal(read(path), checkpoint(1.0))


def test_an_incomplete_folder_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "last.ckpt")
    shards.require_complete(path)
    (path / "meta.pt").write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"its bytes are not those that were saved"):
        shards.require_complete(path)
    (path / manifest.COMMIT).unlink()
    with pytest.raises(CheckpointError, match=r"its save did not come to an end"):
        shards.require_complete(path)


def test_a_pickle_inside_is_not_run(tmp_path: Path) -> None:
    path = save(tmp_path / "last.ckpt")
    torch.save({"x": Path("foreign")}, path / "meta.pt")
    with pytest.raises(CheckpointError, match=r"pathlib\.PosixPath"):
        read(path)


def test_without_optimizers_their_tensors_are_left_on_disk(tmp_path: Path) -> None:
    loaded = shards.read(save(tmp_path / "last.ckpt"), {}, [])
    assert torch.equal(loaded["state_dict"]["a.weight"], torch.ones(3, 2))
    assert loaded["optimizer_states"][0]["state"] == {0: {}, 1: {"momentum_buffer": None}}
