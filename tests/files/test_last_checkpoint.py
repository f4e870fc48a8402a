import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_peft
from lightning_peft import last_checkpoint
from lightning_peft.errors import CheckpointError
from lightning_peft.files import manifest, shards
from lightning_peft.files.checkpoint_io import AtomicCheckpointIO


def save(path: Path, step: int = 0) -> Path:
    content: dict[str, Any] = {"state_dict": {"w": torch.full((50,), 1.0)}, "global_step": step}
    AtomicCheckpointIO().save_checkpoint(content, path)
    return path


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def save_folder(path: Path, step: int = 0) -> Path:
    content: dict[str, Any] = {"state_dict": {"w": torch.full((50,), 1.0)}, "global_step": step}
    shards.prepare(path)
    shards.write(content, path)
    shards.finish(content, path)
    return path


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def test_the_newest_is_found_in_a_run_and_in_its_checkpoints(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints" / "last.ckpt")
    best = save(tmp_path / "checkpoints" / "best.ckpt")
    assert last_checkpoint(tmp_path) == best
    assert last_checkpoint(str(tmp_path / "checkpoints")) == best
    last = save(tmp_path / "checkpoints" / "last.ckpt")
    assert last_checkpoint(tmp_path) == last


def test_a_copy_of_a_run_has_the_same_newest_whatever_the_times_of_its_files(
    tmp_path: Path,
) -> None:
    save(tmp_path / "run" / "best.ckpt")
    save(tmp_path / "run" / "last.ckpt")
    shutil.copytree(tmp_path / "run", tmp_path / "copy", copy_function=shutil.copy)
    os.utime(tmp_path / "copy" / "best.ckpt", (2e9, 2e9))
    assert last_checkpoint(tmp_path / "copy").name == "last.ckpt"


def test_files_of_plain_lightning_go_by_their_own_times(tmp_path: Path) -> None:
    for seconds, name in ((100, "a.ckpt"), (300, "b.ckpt"), (200, "last.ckpt")):
        torch.save({"state_dict": {}}, tmp_path / name)
        os.utime(tmp_path / name, (seconds, seconds))
    assert last_checkpoint(tmp_path).name == "b.ckpt"


@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_damaged_file_is_named_and_passed_over(tmp_path: Path, with_manifest: bool) -> None:
    older, newer = save(tmp_path / "best.ckpt"), save(tmp_path / "last.ckpt")
    damage(newer)
    if not with_manifest:
        manifest.manifest_path(newer).unlink()
    with pytest.warns(UserWarning, match=r"last\.ckpt` is damaged and is passed over"):
        assert last_checkpoint(tmp_path) == older


def test_only_damaged_files_are_named_in_the_error(tmp_path: Path) -> None:
    damage(save(tmp_path / "last.ckpt"))
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(CheckpointError, match=r"only damaged checkpoints \(last\.ckpt\)"),
    ):
        last_checkpoint(tmp_path)


@pytest.mark.parametrize("missing", [True, False])
def test_a_folder_without_checkpoints_is_named(tmp_path: Path, missing: bool) -> None:
    folder = tmp_path / "run"
    if not missing:
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "checkpoints" / "last.ckpt.sha256").write_text("")
        (folder / "checkpoints" / ".last.ckpt.12.tmp").write_text("half")
    with pytest.raises(CheckpointError, match=r"run` must be the folder of a run.*no checkpoint"):
        last_checkpoint(folder)


def test_a_link_to_a_checkpoint_that_is_gone_is_no_candidate(tmp_path: Path) -> None:
    best = save(tmp_path / "best.ckpt")
    (tmp_path / "last.ckpt").symlink_to("gone.ckpt")
    assert last_checkpoint(tmp_path) == best


def test_after_a_kill_between_manifest_and_rename_the_old_file_counts_as_old(
    tmp_path: Path,
) -> None:
    last, best = save(tmp_path / "last.ckpt"), save(tmp_path / "best.ckpt")
    [present] = manifest.read(manifest.manifest_path(last))
    new = manifest.Entry("0" * 64, last.name, manifest.now())
    manifest.write(manifest.manifest_path(last), [present, new])
    assert last_checkpoint(tmp_path) == best


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_folder_of_shards_counts_once_it_is_complete(tmp_path: Path) -> None:
    best, last = save(tmp_path / "best.ckpt"), save_folder(tmp_path / "last.ckpt")
    assert last_checkpoint(tmp_path) == last
    (last / manifest.COMMIT).unlink()
    assert last_checkpoint(tmp_path) == best


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("how", ["changed", "lost"])
def test_a_folder_of_shards_with_a_bad_file_is_passed_over(tmp_path: Path, how: str) -> None:
    best, last = save(tmp_path / "best.ckpt"), save_folder(tmp_path / "last.ckpt")
    shard = next(last.glob("*.safetensors"))
    damage(shard) if how == "changed" else shard.unlink()
    with pytest.warns(UserWarning, match=r"last\.ckpt` is damaged"):
        assert last_checkpoint(tmp_path) == best


def test_it_is_a_public_name() -> None:
    assert lightning_peft.last_checkpoint is last_checkpoint
