"""The files of an adapter's folder: written whole or not at all, read without running anything."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_peft.errors import CheckpointError

TENSORS = "adapter_model.safetensors"
CONFIG = "lightning_peft.json"
THEIR_CONFIG = "adapter_config.json"
ADAPTERHUB = ("adapter.safetensors", "model_head.safetensors", "head_config.json")
_FILES = (TENSORS, CONFIG, THEIR_CONFIG, *ADAPTERHUB)
_PICKLES = ("adapter_model.bin", "pytorch_adapter.bin", "pytorch_model.bin", "adapter_model.pt")


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """Return tensors as the content of a safetensors file."""
    from safetensors.torch import save

    owned = {name: t.contiguous() for name, t in tensors.items()}
    counts = Counter(tensor.data_ptr() for tensor in owned.values())
    apart = {name: t.clone() if counts[t.data_ptr()] > 1 else t for name, t in owned.items()}
    return save(apart, {"format": "pt"})  # which refuses tensors that share memory


def parse(data: bytes, path: Path) -> dict[str, Tensor]:
    """Return the tensors in the content of a safetensors file.

    Raises:
        CheckpointError: it is none, or not all of one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"`{path}` is no safetensors file: {error}.") from error


def dump(content: Mapping[str, Any]) -> bytes:
    """Return JSON that a person can read."""
    return (json.dumps(content, indent=2) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"`{path}` must be JSON, but cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"`{path}` must hold settings by name, but does not.")
    return content


def read_tensors(folder: Path) -> bytes:
    """Return the content of the folder's safetensors file.

    Raises:
        CheckpointError: there is none; what could run code is named, and not opened.
    """
    try:
        return (folder / TENSORS).read_bytes()
    except OSError as error:
        pickles = [name for name in _PICKLES if (folder / name).exists()]
        if not pickles:
            raise CheckpointError(
                f"`{folder}` must hold `{TENSORS}` of a saved adapter: {error}."
            ) from error
        raise CheckpointError(
            f"`{folder / pickles[0]}` is a pickle, which can run any code when it is read, and is "
            f"not opened: write it anew as `{TENSORS}`, where you trust it, with `save_pretrained` "
            "of peft."
        ) from error


def write(folder: Path, files: Mapping[str, bytes | None]) -> None:
    """Write files to a folder in order, each whole or not at all, and then take out all others.

    Those that are None, and those that another format left there, would be read in their stead.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            if data is not None:
                _replace(folder / name, data)
        for name in [name for name in _FILES if files.get(name) is None]:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"The adapter cannot be written to `{folder}`: {error}.") from error


def _replace(path: Path, data: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
