import errno
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from lightning_peft.errors import CheckpointError, NonFiniteError
from lightning_peft.files import manifest
from lightning_peft.files.checkpoint_io import AtomicCheckpointIO


def checkpoint(value: float = 1.0, size: int = 300) -> dict[str, Any]:
    return {"state_dict": {"head.weight": torch.full((size,), value)}, "epoch": 3}


def value_of(path: Path) -> float:
    return AtomicCheckpointIO().load_checkpoint(path)["state_dict"]["head.weight"][0].item()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints" / "last.ckpt"


@pytest.fixture
def saved(path: Path) -> Path:
    AtomicCheckpointIO().save_checkpoint(checkpoint(1.0), path)
    return path


def names(path: Path) -> set[str]:
    return {file.name for file in path.parent.iterdir()}


def flip_a_bit(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.proof,)


def test_what_was_saved_is_loaded(saved: Path) -> None:
    loaded = AtomicCheckpointIO().load_checkpoint(saved)
    assert torch.equal(loaded["state_dict"]["head.weight"], torch.ones(300))
    assert loaded["epoch"] == 3
    assert names(saved) == {"last.ckpt", "last.ckpt.sha256"}


def test_the_manifest_is_read_by_sha256sum(saved: Path) -> None:
    AtomicCheckpointIO().save_checkpoint(checkpoint(2.0), saved)
    command = ["sha256sum", "--check", "--strict", "last.ckpt.sha256"]
    result = subprocess.run(command, cwd=saved.parent, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "last.ckpt: OK\n"), result.stderr


@pytest.mark.parametrize("part", ["first byte", "a weight", "last byte"])
def test_a_flipped_bit_is_refused(saved: Path, part: str) -> None:
    whole = saved.read_bytes()
    ones = whole.index(torch.ones(4).numpy().tobytes())
    flip_a_bit(saved, {"first byte": 0, "a weight": ones + 500, "last byte": len(whole) - 1}[part])
    with pytest.raises(CheckpointError, match=r"last\.ckpt` is damaged.*last_checkpoint"):
        AtomicCheckpointIO().load_checkpoint(saved)


def test_a_flipped_weight_is_refused_without_a_manifest_although_torch_reads_it(
    saved: Path,
) -> None:
    flip_a_bit(saved, saved.read_bytes().index(torch.ones(4).numpy().tobytes()) + 500)
    manifest.manifest_path(saved).unlink()
    assert not torch.equal(torch.load(saved)["state_dict"]["head.weight"], torch.ones(300))
    with pytest.raises(CheckpointError, match="damaged"):
        AtomicCheckpointIO().load_checkpoint(saved)


@pytest.mark.parametrize("keep", [0, 10, 1000])
@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_truncated_file_is_refused(saved: Path, keep: int, with_manifest: bool) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    if not with_manifest:
        manifest.manifest_path(saved).unlink()
    with pytest.raises(CheckpointError, match="damaged"):
        AtomicCheckpointIO().load_checkpoint(saved)


def test_a_file_of_plain_lightning_is_loaded_and_replaced(path: Path) -> None:
    path.parent.mkdir()
    torch.save(checkpoint(5.0), path)
    assert value_of(path) == 5.0
    AtomicCheckpointIO().save_checkpoint(checkpoint(6.0), path)
    assert value_of(path) == 6.0


def test_a_missing_file_is_named(path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"last\.ckpt` does not exist: .*last_checkpoint"):
        AtomicCheckpointIO().load_checkpoint(path)


def test_a_folder_of_shards_is_sent_to_its_strategy(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(CheckpointError, match="trainer=model_parallel"):
        AtomicCheckpointIO().load_checkpoint(path)


def test_a_link_is_compared_with_the_manifest_of_its_target(saved: Path) -> None:
    link = saved.with_name("linked.ckpt")
    link.symlink_to(saved.name)
    assert value_of(link) == 1.0
    flip_a_bit(saved, 1500)
    with pytest.raises(CheckpointError, match="damaged"):
        AtomicCheckpointIO().load_checkpoint(link)


def test_a_save_over_a_link_leaves_the_linked_checkpoint(saved: Path) -> None:
    link = saved.with_name("linked.ckpt")
    link.symlink_to(saved.name)
    AtomicCheckpointIO().save_checkpoint(checkpoint(2.0), link)
    assert (value_of(link), value_of(saved)) == (2.0, 1.0)


def test_removing_takes_the_manifest_along(saved: Path) -> None:
    AtomicCheckpointIO().remove_checkpoint(saved)
    assert names(saved) == set()


# What must not be saved, and what must not be run


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_tensor_is_not_saved(saved: Path, value: float) -> None:
    broken = checkpoint(2.0)
    broken["state_dict"]["encoder.bias"] = torch.tensor([0.0, value])
    with pytest.raises(NonFiniteError, match=r"`encoder\.bias` must be finite"):
        AtomicCheckpointIO().save_checkpoint(broken, saved)
    assert value_of(saved) == 1.0
    assert names(saved) == {"last.ckpt", "last.ckpt.sha256"}


@pytest.mark.parametrize("weights_only", [None, True])
def test_a_payload_is_not_run(path: Path, tmp_path: Path, weights_only: bool | None) -> None:
    path.parent.mkdir()
    proof = tmp_path / "ran"
    torch.save({"state_dict": {}, "hyper_parameters": {"x": Payload(proof)}}, path)
    with pytest.raises(CheckpointError, match=r"which safe loading refuses.*save_hyperparameters"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=weights_only)
    assert not proof.exists()
    pickle.loads(pickle.dumps(Payload(proof)))
    assert proof.exists(), "the payload would not have done anything"


def test_a_foreign_class_is_named_at_the_first_save_and_at_the_load(path: Path) -> None:
    io, content = AtomicCheckpointIO(), {"state_dict": {}, "hyper_parameters": {"to": Path("x")}}
    with pytest.warns(UserWarning, match=r"`pathlib\.PosixPath`.*Resuming .* refused"):
        io.save_checkpoint(content, path)
    io.save_checkpoint(content, path)  # warned once
    with pytest.raises(CheckpointError, match=r"`pathlib\.PosixPath`.*weights_only=False"):
        io.load_checkpoint(path)
    assert io.load_checkpoint(path, weights_only=False)["hyper_parameters"] == {"to": Path("x")}


# A disk that refuses


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """Let the system refuse to make any file larger than `size` bytes, in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_in_mid_write_keeps_the_previous_file(saved: Path) -> None:
    with files_limited_to(20_000), pytest.raises(CheckpointError, match="could not be written"):
        AtomicCheckpointIO().save_checkpoint(checkpoint(2.0, size=100_000), saved)
    assert value_of(saved) == 1.0
    assert names(saved) == {"last.ckpt", "last.ckpt.sha256"}


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "free some space"), (errno.EROFS, "read-only"), (errno.EACCES, "writable")],
)
@pytest.mark.parametrize("call", range(6))
def test_an_error_of_the_disk_at_any_flush_is_one_sentence(
    saved: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str, call: int
) -> None:
    real, calls = os.fsync, iter(range(100))

    def fsync(handle: int) -> None:
        if next(calls) == call:
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CheckpointError) as caught:
        AtomicCheckpointIO().save_checkpoint(checkpoint(2.0), saved)
    monkeypatch.undo()
    message = str(caught.value)
    assert str(saved) in message
    assert remedy in message
    assert "\n" not in message
    assert value_of(saved) in (1.0, 2.0)
    assert names(saved) == {"last.ckpt", "last.ckpt.sha256"}


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(CheckpointError, match=r"taken/last\.ckpt` could not be written.*dirpath"):
        AtomicCheckpointIO().save_checkpoint(checkpoint(), tmp_path / "taken" / "last.ckpt")


def test_an_error_that_is_not_the_disks_keeps_its_own_words(path: Path) -> None:
    content = {"state_dict": {}, "loops": lambda: None}
    with pytest.raises((AttributeError, pickle.PicklingError), match="pickle"):
        AtomicCheckpointIO().save_checkpoint(content, path)
    assert names(path) == set()


def test_remains_of_a_killed_save_are_cleared_when_they_are_old(saved: Path) -> None:
    old, young = (saved.with_name(f".last.ckpt.{n}.tmp") for n in (1, 2))
    for leftover in (old, young):
        leftover.write_bytes(b"half")
    os.utime(old, (0, 0))
    AtomicCheckpointIO().save_checkpoint(checkpoint(2.0), saved)
    assert names(saved) == {"last.ckpt", "last.ckpt.sha256", young.name}


@pytest.mark.parametrize("kind", ["file", "shards"])
def test_a_kill_before_any_change_to_the_disk_leaves_an_intact_checkpoint(
    tmp_path: Path, kind: str
) -> None:
    script = str(Path(__file__).with_name("kill_points.py"))
    result = subprocess.run(
        [sys.executable, script, str(tmp_path), kind],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(result.stdout.split()[0]) >= 7


# Under the Trainer


class Model(BoringModel):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def trainer(folder: Path, epochs: int, **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=epochs,
        limit_train_batches=3,
        limit_val_batches=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
        **settings,
    )


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path")
def test_the_trainer_saves_resumes_and_cleans_up_through_it(tmp_path: Path) -> None:
    keep = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_last=True)
    trainer(tmp_path, 2, callbacks=[keep]).fit(Model())
    assert {file.name for file in tmp_path.iterdir()} == {
        "epoch=1.ckpt",
        "epoch=1.ckpt.sha256",
        "last.ckpt",
        "last.ckpt.sha256",
    }
    model = Model()
    resumed = trainer(tmp_path, 3, enable_checkpointing=False)
    resumed.fit(model, ckpt_path=tmp_path / "last.ckpt")
    assert resumed.global_step == 9


def test_a_resume_from_a_damaged_file_stops_before_the_model_is_touched(tmp_path: Path) -> None:
    first = trainer(tmp_path, 1, enable_checkpointing=False)
    first.fit(Model())
    first.save_checkpoint(tmp_path / "last.ckpt")
    flip_a_bit(tmp_path / "last.ckpt", 900)
    model = Model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="damaged"):
        trainer(tmp_path, 2, enable_checkpointing=False).fit(
            model, ckpt_path=tmp_path / "last.ckpt"
        )
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_with_nan_weights_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    model = Model()
    run = trainer(tmp_path, 1, enable_checkpointing=False)
    run.fit(model)
    run.save_checkpoint(tmp_path / "last.ckpt")
    nn.init.constant_(model.layer.bias, float("nan"))
    with pytest.raises(NonFiniteError, match=r"`layer\.bias`"):
        run.save_checkpoint(tmp_path / "last.ckpt")
    loaded = AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")
    assert loaded["state_dict"]["layer.bias"].isfinite().all()
