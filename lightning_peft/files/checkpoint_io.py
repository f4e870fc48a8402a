"""Checkpoints that survive a kill, a full disk and a flipped bit.

Order of a save, with the state that a kill leaves behind after each step:

1. temporary file in the target's folder, flushed to disk: the old file and its manifest;
2. manifest with the old *and* the new digest: the old file, confirmed by the first line;
3. rename over the old file: the new file, confirmed by the second line;
4. manifest with the new digest alone: the new file.
"""

import errno
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_peft.errors import CheckpointError, NonFiniteError
from lightning_peft.files import manifest

_REMOTE = re.compile(r"^\w+(::|://)")
_TAKE_LAST = "take the newest intact one with `lightning_peft.last_checkpoint(folder)`"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Save and load Lightning checkpoints atomically, verified and without unsafe pickles.

    Beside ``last.ckpt`` lies ``last.ckpt.sha256``, which ``sha256sum -c`` reads. A save that
    fails leaves the previous file; a file whose bytes have changed is refused. Remote paths
    (``s3://…``) go through Lightning's own reader and writer, which stores them in one piece.

    Example::

        Trainer(plugins=[AtomicCheckpointIO()])
    """

    def __init__(self) -> None:
        self._warned = False

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write `checkpoint` to `path`, all or nothing.

        Raises:
            NonFiniteError: a tensor of ``checkpoint["state_dict"]`` holds NaN or infinity.
            CheckpointError: the folder is read-only, the disk is full, …
        """
        require_finite(checkpoint.get("state_dict", {}))
        if storage_options is not None or is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path).absolute()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _save(checkpoint, path)
        except (OSError, RuntimeError) as error:
            cause = disk_error(error)
            if cause is None:
                raise
            raise not_written(path, cause) from error
        self._warn_of_unsafe_classes(path)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = "cpu",
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read `path` after its bytes were compared with its manifest, when there is one.

        Pickled objects other than tensors and plain containers are refused, unless
        `weights_only` is exactly ``False``.

        Raises:
            CheckpointError: the file is missing, damaged, or holds an object of a foreign class.
        """
        safe = weights_only is not False
        if is_remote(path):
            return super().load_checkpoint(path, map_location, weights_only=safe)
        path = Path(path).absolute()
        _require_file(path)
        if not is_intact(path):
            raise damaged(path)
        return read_file(path, map_location, safe)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint and its manifest."""
        super().remove_checkpoint(path)
        if not is_remote(path):
            manifest.manifest_path(Path(path)).unlink(missing_ok=True)

    def _warn_of_unsafe_classes(self, path: Path) -> None:
        """Say once, at the first save, what would make the resume fail."""
        if self._warned:
            return
        self._warned = True
        if names := torch.serialization.get_unsafe_globals_in_checkpoint(path):
            rank_zero_warn(f"{_foreign(path, names)} Resuming from it will be refused.")


def is_remote(path: str | Path) -> bool:
    """Return whether `path` names another file system than the local one (``s3://…``)."""
    return bool(_REMOTE.match(str(path)))


def is_intact(path: Path) -> bool:
    """Return whether a checkpoint's bytes are those that were saved.

    Without a manifest (a file that plain Lightning wrote) the checksums inside the file decide.
    ``torch.load`` does not check them: it reads a tensor with a flipped bit without an error.
    """
    path = path.resolve()  # Lightning can link last.ckpt to another checkpoint
    if entries := manifest.read(manifest.manifest_path(path)):
        return manifest.digest(path) in {entry.digest for entry in entries}
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (zipfile.BadZipFile, EOFError, OSError):
        return False


def require_finite(state: Mapping[str, Any]) -> None:
    """Refuse a state dict with NaN or infinity in it.

    Raises:
        NonFiniteError: names the tensor.
    """
    for name, value in state.items():
        if isinstance(value, Tensor) and not torch.isfinite(value).all():
            raise NonFiniteError(
                f"`{name}` must be finite to be saved, but holds NaN or infinity instead: "
                "the checkpoint was not written and the previous one is kept; "
                "resume from it with a lower learning rate or with gradient clipping."
            )


def damaged(path: Path, why: str = "its bytes are not those that were saved") -> CheckpointError:
    """Return the error for a checkpoint that cannot be trusted."""
    return CheckpointError(f"`{path}` is damaged: {why}; {_TAKE_LAST}.")


def not_written(path: Path, error: OSError) -> CheckpointError:
    """Return the error for a checkpoint that the disk did not take, with the remedy."""
    remedy = {
        errno.ENOSPC: "free some space on the disk",
        errno.EDQUOT: "free some space in your quota",
        errno.EROFS: "choose a folder that is not read-only",
        errno.EACCES: "make the folder writable",
    }.get(error.errno or 0, "check the folder")
    return CheckpointError(
        f"`{path}` could not be written ({error.strerror or error}): {remedy}, or choose another "
        "with `ModelCheckpoint(dirpath=…)`; the last complete checkpoint is kept."
    )


def disk_error(error: BaseException | None) -> OSError | None:
    """Return the OSError behind `error`: torch's zip writer hides it in a RuntimeError."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def read_file(path: Path, map_location: Any, safe: bool) -> dict[str, Any]:
    """Read a checkpoint without comparing its digest; `safe` refuses pickled objects.

    Raises:
        CheckpointError: the file cannot be read, or holds an object of a foreign class.
    """
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=safe)
    except pickle.UnpicklingError as error:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if not names:
            raise damaged(path, "its content cannot be read") from error
        raise CheckpointError(_foreign(path, names)) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise damaged(path, "its content cannot be read") from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"`{path}` must hold a dict, but holds {type(checkpoint)} instead.")
    return checkpoint


def _save(checkpoint: dict[str, Any], path: Path) -> None:
    listing = manifest.manifest_path(path)
    with manifest.replacing(path) as temporary:
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
        new = manifest.Entry(manifest.digest(temporary), path.name, manifest.now())
        manifest.write(listing, [*_present_entries(path), new])
    if not path.is_file():
        raise OSError(errno.ENOENT, "the file is not there after the save")
    manifest.write(listing, [new])


def _present_entries(path: Path) -> list[manifest.Entry]:
    """Return the entries that confirm the file now at `path`, if there is one."""
    if not path.is_file() or path.is_symlink():
        return []
    if manifest.manifest_path(path).is_file():
        return manifest.current(path)
    return [manifest.Entry(manifest.digest(path), path.name)]


def _require_file(path: Path) -> None:
    if path.is_dir():
        raise CheckpointError(
            f"`{path}` must be a checkpoint file, but is a folder of shards instead: "
            "load it with `trainer=model_parallel`, which wrote it."
        )
    if not path.is_file():
        raise CheckpointError(f"`{path}` does not exist: {_TAKE_LAST}.")


def _foreign(path: Path, names: list[str]) -> str:
    classes = ", ".join(f"`{name}`" for name in sorted(names))
    return (
        f"`{path}` holds objects of {classes}, which safe loading refuses: keep plain numbers, "
        "strings, lists and dicts in callback states and hyper-parameters "
        "(`save_hyperparameters(ignore=[…])`), or, for a file that you trust, "
        "pass `weights_only=False`."
    )
