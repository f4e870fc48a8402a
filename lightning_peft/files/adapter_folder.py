"""An adapter on disk: `adapter_model.safetensors` beside a readable `lightning_peft.json`.

Where peft's format holds the adapter without loss the tensors have peft's keys, and
`adapter_config.json` stands beside them: one folder serves both. `lightning_peft.json`, the
sidecar, says what peft's configuration cannot: our methods, the base's fingerprint, checksums. A
folder without it is taken for one that peft wrote.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import lightning_peft
from lightning_peft.adapter import Adapter
from lightning_peft.carrying.state import check_state
from lightning_peft.config import instantiate_as, to_spec
from lightning_peft.delta import SLOT
from lightning_peft.errors import CheckpointError, ConfigError, PEFTError
from lightning_peft.files import adapterhub, folder_io
from lightning_peft.files.folder_io import (
    TENSORS,
    dump,
    pack,
    parse,
    read_json,
    read_tensors,
    write,
)
from lightning_peft.files.hub import located
from lightning_peft.files.peft import exchange
from lightning_peft.files.peft.settings import Settings
from lightning_peft.files.peft.spelling import Inexpressible
from lightning_peft.files.sidecar import check_sidecar
from lightning_peft.files.sizes import check_sizes
from lightning_peft.fingerprint import check_fingerprint, fingerprint_for
from lightning_peft.method import Method, inject
from lightning_peft.structure.targets import exactly

CONFIG, THEIR_CONFIG = folder_io.CONFIG, folder_io.THEIR_CONFIG
FORMAT = 2

_RAW = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, re.error)


def save_adapter(adapter: Adapter, folder: str | Path) -> Path:
    """Write `adapter` to `folder`, each file whole or not at all, and return the folder.

    Raises:
        CheckpointError: the folder cannot be written, or a tensor holds NaN or infinite values.
    """
    return write_adapter(adapter, adapter.state_dict(), folder)


def write_adapter(adapter: Adapter, tensors: Mapping[str, Tensor], folder: str | Path) -> Path:
    """Write `adapter` to `folder` with the values of `tensors`, gathered from where they live."""
    state = _finite(adapter, tensors)
    spelled = _lossless(adapter, state)
    if spelled is None:
        data, theirs = pack(state), None
    else:
        rounded = {name: state[name] for name in spelled.rounded()}
        data, theirs = pack(spelled.tensors(state) | rounded), dump(spelled.config)
    own = dump(_describe(adapter, data, theirs))
    write(Path(folder), {TENSORS: data, THEIR_CONFIG: theirs, CONFIG: own})
    return Path(folder)


def export_adapter(adapter: Adapter, folder: str | Path, part: str | None = None) -> Path:
    """Write `adapter`, or one part of a combination, in peft's format and nothing else.

    Args:
        adapter: what to write.
        folder: where to; what an earlier save left there is replaced.
        part: the kind of the method to write (`lora`); None where there is one.

    Raises:
        AdapterError: peft cannot hold it; the message says why.
        CheckpointError: the folder cannot be written, or a tensor holds NaN or infinite values.
    """
    state, spelled = _finite(adapter, adapter.state_dict()), exchange.spell(adapter, part)
    data = pack(spelled.tensors(state))
    write(Path(folder), {TENSORS: data, THEIR_CONFIG: dump(spelled.config)})
    return Path(folder)


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    name: str | None = None,
    *,
    ignore_fingerprint: bool = False,
    revision: str | None = None,
    subfolder: str = "",
) -> Adapter:
    """Inject into `model` the adapter that was saved in `folder`, by us, peft or AdapterHub.

    Args:
        model: the base that the adapter was trained on.
        folder: what `Adapter.save`, `Adapter.export`, peft's `save_pretrained` or, as safetensors,
            AdapterHub's `save_adapter` wrote, here or in a repository `org/name` on the Hugging
            Face hub.
        name: another name for the adapter than the one it was saved under.
        ignore_fingerprint: take the model for the adapter's base although its values differ.
        revision: a branch, tag or commit of the repository.
        subfolder: where in the folder or repository the adapter is.

    Raises:
        CheckpointError: the folder is incomplete or damaged, the model is another base, a setting
            or a tensor does not fit; the model is left as it was.
        TargetError: a pattern matches nothing; the model is left as it was.
    """
    folder = located(folder, revision, subfolder)
    own = (folder / CONFIG).exists()
    if not own and adapterhub.is_here(folder):
        return _load_adapterhubs(model, folder, name)
    data = read_tensors(folder)
    if own:
        return _load_own(model, folder, data, name, ignore_fingerprint)
    if (folder / THEIR_CONFIG).exists():
        return _load_theirs(model, folder, data, name)
    raise CheckpointError(
        f"`{folder}` must hold `{TENSORS}` and `{CONFIG}` of a saved adapter, or peft's "
        f"`{THEIR_CONFIG}` instead, but has neither of the two: `{CONFIG}` is missing."
    )


def _load_own(
    model: nn.Module, folder: Path, data: bytes, name: str | None, ignore_fingerprint: bool
) -> Adapter:
    config = checked(folder, data)
    methods = [_method(spec, f"methods[{i}]") for i, spec in enumerate(config["methods"])]
    old, new = config["name"], name or config["name"]
    tensors = parse(data, folder / TENSORS)
    check_sizes(methods, tensors, f"`{folder / CONFIG}`")
    state = {_renamed(key, old, new): tensor for key, tensor in tensors.items()}
    if not ignore_fingerprint:
        present = fingerprint_for(model, set(config.get("replaced", state)))
        check_fingerprint(config["fingerprint"], present, f"`{folder}`")
    with _translated(folder / CONFIG):
        adapter = inject(model, methods, new, train=exactly(config["in_place"]), head=False)
    with _removed_on_error(adapter, folder):
        if config.get("keys") == "peft":
            state = exchange.spell(adapter, check=False).respelled(state)
        adapter.load_state_dict(state)
    return adapter


def _load_theirs(model: nn.Module, folder: Path, data: bytes, name: str | None) -> Adapter:
    values = read_json(folder / THEIR_CONFIG)
    tensors = parse(data, folder / TENSORS)
    settings = Settings(values, str(folder / THEIR_CONFIG))
    with _translated(folder / THEIR_CONFIG):
        described = exchange.describe(settings, list(tensors), model)
        check_sizes(described.methods, tensors, f"`{folder / THEIR_CONFIG}`")
        patterns = exactly(described.in_place)
        adapter = inject(model, described.methods, name or "default", train=patterns, head=False)
    with _removed_on_error(adapter, folder, str(values.get("base_model_name_or_path") or "")):
        adapter.load_state_dict(exchange.read(described, adapter, tensors))
        exchange.require_same(described, adapter)
    return adapter


def _load_adapterhubs(model: nn.Module, folder: Path, name: str | None) -> Adapter:
    described = adapterhub.describe(folder, model)
    patterns = exactly(described.in_place)
    adapter = inject(model, described.method, name or described.name, train=patterns, head=False)
    with _removed_on_error(adapter, folder, described.base):
        adapter.load_state_dict(described.state(adapter))
    return adapter


def _finite(adapter: Adapter, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = {name: t.cpu().contiguous() for name, t in tensors.items()}
    try:
        check_state(state, state, f"adapter `{adapter.name}`")
    except PEFTError as error:
        raise CheckpointError(f"The adapter was not saved: {error}") from error
    return state


def _lossless(adapter: Adapter, state: Mapping[str, Tensor]) -> exchange.Spelled | None:
    try:
        spelled = exchange.spell(adapter)
        return spelled if spelled.holds(state) else None
    except Inexpressible:
        return None


def _describe(adapter: Adapter, data: bytes, theirs: bytes | None) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "lightning_peft": lightning_peft.__version__,
        "name": adapter.name,
        "base": _base_name(adapter.model),
        "methods": [to_spec(method) for method in adapter.methods],
        "in_place": adapter.in_place,
        "replaced": sorted(n for n in adapter.tensors() if SLOT not in n.split(".")),
        "keys": "own" if theirs is None else "peft",
        "parameters": adapter.num_parameters,
        "fingerprint": adapter.base_fingerprint,
        "sha256": _sha256(data),
    } | ({} if theirs is None else {"adapter_config_sha256": _sha256(theirs)})


def _base_name(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    return {
        "class": type(model).__name__,
        "name_or_path": str(getattr(config, "name_or_path", "") or ""),
        "labels": [str(name) for name in (getattr(config, "id2label", None) or {}).values()],
    }


def labels_of(folder: str | Path) -> tuple[str, ...]:
    """Return what the classes of a saved adapter's model were called; none where it is not said."""
    sidecar = Path(folder) / CONFIG
    base = read_json(sidecar).get("base", {}) if sidecar.is_file() else {}
    return tuple(base.get("labels", ()))


def _method(spec: Any, where: str) -> Method:
    try:
        return instantiate_as(Method, spec, where)
    except ConfigError as error:
        raise CheckpointError(f"`{CONFIG}` cannot be read: {error}") from error


def checked(folder: Path, data: bytes) -> dict[str, Any]:
    """Return the sidecar in `folder`, whose tensors' bytes are `data`.

    Raises:
        CheckpointError: it cannot be read, or the files are not those that were saved.
    """
    config = read_json(folder / CONFIG)
    check_sidecar(config, folder / CONFIG)
    if _sha256(data) != config["sha256"]:
        raise CheckpointError(
            f"`{folder / TENSORS}` is damaged: its SHA-256 is not the one in `{CONFIG}`."
        )
    if config.get("keys") == "peft":
        _check_theirs(folder, config)
    return config


def _check_theirs(folder: Path, config: Mapping[str, Any]) -> None:
    path = folder / THEIR_CONFIG
    if path.exists() and _sha256(path.read_bytes()) != config.get("adapter_config_sha256"):
        raise CheckpointError(
            f"`{path}` was changed since the adapter was saved: its SHA-256 is not the one in "
            f"`{CONFIG}`; put it back, or remove `{CONFIG}` to load the folder as one of peft's."
        )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _renamed(key: str, old: str, new: str) -> str:
    return key.replace(f"{SLOT}.{old}_", f"{SLOT}.{new}_")


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Turn what settings of a wrong kind bring about into one sentence."""
    try:
        yield
    except PEFTError:
        raise
    except _RAW as error:
        raise CheckpointError(
            f"A setting in `{path}` cannot be honoured: {type(error).__name__}: {error}."
        ) from error


@contextmanager
def _removed_on_error(adapter: Adapter, folder: Path, base: str = "") -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        adapter.forget()
        if not isinstance(error, PEFTError):
            raise
        trained = f" It was trained on `{base}`." if base else ""
        raise CheckpointError(f"`{folder}` does not fit this model: {error}{trained}") from error
