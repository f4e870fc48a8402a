"""An adapter on disk: `adapter_model.safetensors` beside a readable `lightning_peft.json`."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import lightning_peft
from lightning_peft.adapter import Adapter, check_state
from lightning_peft.config import instantiate_as, to_spec
from lightning_peft.delta import SLOT
from lightning_peft.errors import CheckpointError, ConfigError, PEFTError
from lightning_peft.fingerprint import check_fingerprint, fingerprint
from lightning_peft.method import Method, inject

TENSORS = "adapter_model.safetensors"
CONFIG = "lightning_peft.json"
FORMAT = 1
_NEEDED = ("name", "methods", "in_place", "fingerprint", "sha256")


def save_adapter(adapter: Adapter, folder: str | Path) -> Path:
    """Write `adapter` to `folder`, each file whole or not at all, and return the folder.

    Raises:
        CheckpointError: the folder cannot be written, or a tensor holds NaN or infinite values.
    """
    return write_adapter(adapter, adapter.state_dict(), folder)


def write_adapter(adapter: Adapter, tensors: Mapping[str, Tensor], folder: str | Path) -> Path:
    """Write `adapter` to `folder` with the values of `tensors`, gathered from where they live."""
    from safetensors.torch import save

    state = {name: t.cpu().contiguous() for name, t in tensors.items()}
    try:
        check_state(state, state, f"adapter `{adapter.name}`")
    except PEFTError as error:
        raise CheckpointError(f"The adapter was not saved: {error}") from error
    data = save(state, {"format": "pt"})
    text = json.dumps(_describe(adapter, data), indent=2) + "\n"
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / TENSORS, data)
        _replace(folder / CONFIG, text.encode())
    except OSError as error:
        raise CheckpointError(f"The adapter cannot be written to `{folder}`: {error}.") from error
    return folder


def load_adapter(model: nn.Module, folder: str | Path, name: str | None = None) -> Adapter:
    """Inject into `model` the adapter that was saved in `folder`.

    Args:
        model: the base that the adapter was trained on.
        folder: what `Adapter.save` wrote.
        name: another name for the adapter than the one it was saved under.

    Raises:
        CheckpointError: the folder is incomplete or damaged, the model is another base, or its
            tensors do not fit; the model is left as it was.
    """
    folder = Path(folder)
    config, tensors = _read(folder)
    methods = [_method(spec, f"methods[{i}]") for i, spec in enumerate(config["methods"])]
    old, new = config["name"], name or config["name"]
    state = {_renamed(key, old, new): tensor for key, tensor in tensors.items()}
    present = fingerprint(model, set(state))
    check_fingerprint(config["fingerprint"], present, f"`{folder}`")
    exactly = [f"re:{re.escape(parameter)}" for parameter in config["in_place"]]
    adapter = inject(model, methods, new, train=exactly, head=False)
    with _removed_on_error(adapter, folder):
        adapter.load_state_dict(state)
    return adapter


def _describe(adapter: Adapter, data: bytes) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "lightning_peft": lightning_peft.__version__,
        "name": adapter.name,
        "base": _base_name(adapter.model),
        "methods": [to_spec(method) for method in adapter.methods],
        "in_place": adapter.in_place,
        "parameters": adapter.num_parameters,
        "fingerprint": adapter.base_fingerprint,
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def _base_name(model: nn.Module) -> dict[str, str]:
    config = getattr(model, "config", None)
    return {
        "class": type(model).__name__,
        "name_or_path": str(getattr(config, "name_or_path", "") or ""),
    }


def _method(spec: Any, where: str) -> Method:
    try:
        return instantiate_as(Method, spec, where)
    except ConfigError as error:
        raise CheckpointError(f"`{CONFIG}` cannot be read: {error}") from error


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        data = (folder / TENSORS).read_bytes()
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"`{folder}` must hold `{TENSORS}` and `{CONFIG}` of a saved adapter: {error}."
        ) from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(
            f"`{folder / CONFIG}` must have `format` {FORMAT}: update the package."
        )
    if lacking := [key for key in _NEEDED if key not in config]:
        raise CheckpointError(f"`{folder / CONFIG}` lacks `{lacking[0]}`: save the adapter again.")
    if hashlib.sha256(data).hexdigest() != config["sha256"]:
        raise CheckpointError(
            f"`{folder / TENSORS}` is damaged: its SHA-256 is not the one in `{CONFIG}`."
        )
    return config, _parse(data, folder / TENSORS)


def _parse(data: bytes, path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data)
    except SafetensorError as error:
        raise CheckpointError(f"`{path}` is no safetensors file: {error}.") from error


def _renamed(key: str, old: str, new: str) -> str:
    return key.replace(f"{SLOT}.{old}_", f"{SLOT}.{new}_")


@contextmanager
def _removed_on_error(adapter: Adapter, folder: Path) -> Iterator[None]:
    try:
        yield
    except PEFTError as error:
        adapter.forget()
        raise CheckpointError(f"`{folder}` does not fit this model: {error}") from error


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
