"""Find the checkpoint to resume from."""

import datetime
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from lightning_peft.errors import CheckpointError
from lightning_peft.files import manifest
from lightning_peft.files.checkpoint_io import is_intact

# A kill between the two renames of a sharded save leaves a complete folder under these names.
_PATTERNS = ("*.ckpt", ".*.ckpt.new", ".*.ckpt.old")


def last_checkpoint(folder: str | os.PathLike[str]) -> Path:
    """Return the newest intact checkpoint of a run.

    Looks in `folder` and in its sub-folder ``checkpoints``. Each file is compared with its
    SHA-256 manifest, or, without one, with the checksums inside the file; a folder of shards
    counts only when it was saved to its end. Damaged ones are named in a warning and passed over.

    Raises:
        CheckpointError: no intact checkpoint is there.
    """
    folder = Path(folder)
    found = sorted(_candidates(folder), key=_saved, reverse=True)
    damaged = []
    for path in found:
        if manifest.is_complete(path) if path.is_dir() else is_intact(path):
            return path
        warnings.warn(f"`{path}` is damaged and is passed over for an older one.", stacklevel=2)
        damaged.append(path.name)
    state = f"only damaged checkpoints ({', '.join(damaged)})" if damaged else "no checkpoint"
    raise CheckpointError(
        f"`{folder}` must be the folder of a run that saved a checkpoint, but has {state} instead: "
        "name another folder, or train anew with `job=fit`."
    )


def _candidates(folder: Path) -> Iterator[Path]:
    for place in (folder, folder / "checkpoints"):
        for pattern in _PATTERNS:
            for path in place.glob(pattern):
                # A folder of shards without its mark is the rest of a save that was killed.
                if path.is_file() or (path / manifest.COMMIT).is_file():
                    yield path


def _saved(path: Path) -> str:
    """Return when `path` was saved; unlike the file's own time it survives a copy."""
    folder = path.is_dir()
    entries = manifest.read(path / manifest.COMMIT) if folder else manifest.current(path.resolve())
    return max((entry.saved for entry in entries), default="") or _modified(path)


def _modified(path: Path) -> str:
    time = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC)
    return time.isoformat(timespec="microseconds")
