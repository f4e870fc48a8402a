"""Folders that are built once on a machine, under the digest of what they are built from."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def built_once(kind: str, digest: str, build: Callable[[Path], None]) -> Path:
    """Return a folder with the weights of a model, which `build` fills the first time.

    It lies among the assets of the hub's cache (`HF_ASSETS_CACHE`), and is there as a whole or not
    at all. Of several processes that ask for it one builds, and the others wait.

    Args:
        kind: How it is built, as part of the folder's name.
        digest: SHA-256 of what it is built from.
        build: Writes safetensors, of one file or of several, and what else belongs to them into
            the empty folder that it is given.
    """
    from filelock import FileLock
    from huggingface_hub import cached_assets_path, constants

    place = constants.HF_ASSETS_CACHE
    folder = cached_assets_path("lightning-peft", kind, digest, assets_dir=place)
    if not _is_built(folder):
        locks = folder.parents[1] / ".locks"  # apart, so that bases stand alone in their folder
        locks.mkdir(exist_ok=True)
        with FileLock(locks / f"{kind}-{digest}"):
            if not _is_built(folder):  # another process was faster
                _build(folder, build)
    return folder


def _is_built(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    partial = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        build(partial)
        shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
