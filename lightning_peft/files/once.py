"""Folders that are built once on a machine, under the digest of what they are built from."""

import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_WEIGHTS = "model.safetensors"


def built_once(kind: str, digest: str, build: Callable[[Path], None]) -> Path:
    """Return a folder with `model.safetensors`, which `build` fills the first time.

    It lies among the assets of the hub's cache (`HF_ASSETS_CACHE`), and is there as a whole or not
    at all, also when several processes build it at once.

    Args:
        kind: How it is built, as part of the folder's name.
        digest: SHA-256 of what it is built from.
        build: Writes the files into the empty folder that it is given.
    """
    from huggingface_hub import cached_assets_path, constants

    place = constants.HF_ASSETS_CACHE
    folder = cached_assets_path("lightning-peft", kind, digest, assets_dir=place)
    if not (folder / _WEIGHTS).is_file():
        partial = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            build(partial)
            with suppress(OSError):  # another process was faster
                partial.replace(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder
