"""Checkpoints as a folder of shards: safetensors written by every process, and a mark at the end.

A new folder is written beside the present one and takes its name only when it is complete::

    .last.ckpt.new/   written, then marked with `complete.sha256`
    last.ckpt/        renamed to .last.ckpt.old/
    .last.ckpt.new/   renamed to last.ckpt/
    .last.ckpt.old/   removed

Whatever the moment of a kill, a marked folder is left, and `last_checkpoint` finds it. Unlike
torch's own format, whose index is a pickle that it reads without restriction, nothing here can
run code.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.distributed.tensor import DTensor

from lightning_peft.files import manifest
from lightning_peft.files.checkpoint_io import damaged, disk_error, not_written, read_file

_META = "meta.pt"  # Lightning's name for what is not a tensor of the model or an optimizer
_MODEL = "state_dict"


def prepare(path: Path) -> None:
    """Bring what a killed save left beside `path` to its end, or clear it away.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    with _translated(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if manifest.is_complete(_new(path)):
            _take_place(path)  # a run may have been resumed from it
        discard(path)


def discard(path: Path) -> None:
    """Remove the folder of a save that did not come to its end."""
    remove(_new(path))


def write(checkpoint: dict[str, Any], path: Path) -> None:
    """Write this process's part of the tensors of the model and the optimizers. Collective.

    Raises:
        CheckpointError: the disk of one of the processes refused.
    """
    tensors, _ = _split(checkpoint)
    writer = HuggingFaceStorageWriter(str(_new(path)), save_distributed=True)
    with _translated(path):
        save_distributed(tensors, storage_writer=writer)


def finish(checkpoint: dict[str, Any], path: Path) -> None:
    """Write the rest of `checkpoint`, mark the folder as complete, and give it its name.

    Raises:
        CheckpointError: the disk refused.
    """
    new = _new(path)
    _, rest = _split(checkpoint)
    with _translated(path):
        torch.save(rest, new / _META)
        manifest.commit(new)
        _take_place(path)


@contextmanager
def moved_away(path: Path, only_folders: bool = True) -> Iterator[None]:
    """Move what is at `path` aside, and remove it when the block has put something in its place.

    When the block raises, what was there comes back.
    """
    old = path.with_name(f".{path.name}.old")
    if path.is_dir() or (path.is_file() and not only_folders):
        remove(old)
        path.rename(old)
    try:
        yield
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    remove(old)


def require_complete(path: Path) -> None:
    """Check that a folder of shards was saved to its end and is unchanged.

    Raises:
        CheckpointError: it is not.
    """
    if not (path / manifest.COMMIT).is_file():
        raise damaged(path, f"its save did not come to an end (no `{manifest.COMMIT}`)")
    if not manifest.is_complete(path):
        raise damaged(path)


def read(
    path: Path,
    model: Mapping[str, Tensor],
    optimizers: Sequence[Sequence[Tensor]],
    weights_only: bool | None = None,
) -> dict[str, Any]:
    """Read a folder of shards into a checkpoint dict, into tensors of its own. Collective.

    Tensors are split over processes like those of `model` and of the `optimizers`' parameters,
    however many processes wrote them.
    """
    reader = HuggingFaceStorageReader(str(path))
    references = {f"{_MODEL}.{name}": tensor for name, tensor in model.items()}
    for i, parameters in enumerate(optimizers):
        references |= {f"optimizer_{i}.{n}": tensor for n, tensor in enumerate(parameters)}
    tensors = {
        name: _empty(stored, _reference(name, references))
        for name, stored in reader.read_metadata().state_dict_metadata.items()
        if optimizers or name.startswith(_MODEL)
    }
    load_distributed(tensors, storage_reader=reader)
    checkpoint = read_file(path / _META, "cpu", weights_only is not False)
    _put_tensors(checkpoint, tensors)
    return checkpoint


def remove(path: Path) -> None:
    """Remove a checkpoint; a kill on the way leaves no folder that looks complete."""
    if path.is_dir():
        (path / manifest.COMMIT).unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _new(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def _take_place(path: Path) -> None:
    with moved_away(path, only_folders=False):
        _new(path).rename(path)
        manifest.sync(path.parent)
    manifest.manifest_path(path).unlink(missing_ok=True)  # of a file that was here before


def _split(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return ``state_dict.<name>`` and ``optimizer_<i>.<position>.<key>``, and all the rest.

    `checkpoint` stays as it is: an optimizer's entries in it are those that it works with.
    """
    seen: set[int] = set()
    state = checkpoint[_MODEL]
    tensors = {f"{_MODEL}.{name}": _unshared(tensor, seen) for name, tensor in state.items()}
    rest = {key: value for key, value in checkpoint.items() if key != _MODEL}
    if "optimizer_states" in checkpoint:
        rest["optimizer_states"] = []
    for i, optimizer in enumerate(checkpoint.get("optimizer_states", [])):
        left: dict[int, dict[str, Any]] = {}
        for position, entry in optimizer["state"].items():
            left[position] = {k: v for k, v in entry.items() if not isinstance(v, Tensor)}
            held = {k: v for k, v in entry.items() if isinstance(v, Tensor)}
            tensors |= {f"optimizer_{i}.{position}.{key}": value for key, value in held.items()}
        rest["optimizer_states"].append({**optimizer, "state": left})
    return tensors, rest


def _put_tensors(checkpoint: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    checkpoint[_MODEL] = {}
    for name, tensor in tensors.items():
        owner, _, rest = name.partition(".")
        if owner == _MODEL:
            checkpoint[_MODEL][rest] = tensor
        else:
            position, _, key = rest.partition(".")
            optimizer = checkpoint["optimizer_states"][int(owner.removeprefix("optimizer_"))]
            optimizer["state"][int(position)][key] = tensor


def _unshared(tensor: Tensor, seen: set[int]) -> Tensor:
    """Return a copy of a tied weight that was already taken: safetensors refuses shared memory."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if local.numel() and local.data_ptr() in seen:
        return tensor.clone()
    seen.add(local.data_ptr())
    return tensor


def _reference(name: str, references: Mapping[str, Tensor]) -> Tensor | None:
    """Return the tensor whose layout `name` has: an optimizer's entry has its parameter's."""
    return references.get(name, references.get(name.rpartition(".")[0]))


def _empty(stored: Any, reference: Tensor | None) -> Tensor:
    dtype = stored.properties.dtype
    if reference is not None and reference.shape == stored.size:
        return torch.empty_like(reference, dtype=dtype, requires_grad=False)
    return torch.empty(stored.size, dtype=dtype)  # unknown name or other shape: the caller refuses


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Turn what the disk refused into one sentence."""
    try:
        yield
    except CheckpointException as error:  # not an `Exception`
        causes = [disk_error(cause) for cause, _ in error.failures.values()]
        raise not_written(path, next(filter(None, causes), OSError(str(error)))) from error
    except (OSError, RuntimeError) as error:
        cause = disk_error(error)
        if cause is None:
            raise
        raise not_written(path, cause) from error
