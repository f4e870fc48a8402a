"""What is in an adapter's folder, a checkpoint or a run's folder, as plain data.

Nothing is built and no model is loaded. Bytes are compared with their checksums where there are
any.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from lightning_peft.delta import SLOT
from lightning_peft.errors import CheckpointError
from lightning_peft.files import manifest, shards
from lightning_peft.files.adapter_folder import CONFIG, THEIR_CONFIG, checked
from lightning_peft.files.checkpoint_io import AtomicCheckpointIO
from lightning_peft.files.folder_io import TENSORS, parse, read_json, read_tensors
from lightning_peft.files.merged_folder import RECORD
from lightning_peft.files.peft.exchange import spelling_of
from lightning_peft.files.peft.settings import Settings
from lightning_peft.training.checkpoint import record_of

_OURS = re.compile(rf"^(?:(.*)\.)?{SLOT}\.[^.]+_([a-z0-9_]+)\.")
_THEIRS = re.compile(
    r"^base_model\.(?:model\.)?(.+?)\.(?:base_layer\.)*"
    r"(?:lora|ia3|vera|hada|lokr|oft|boft|hra|miss|bone|shira|c3a|fourierft|token_adapter|trainable)"
    r"[^.]*"
)


def inspect_path(path: str | Path) -> dict[str, Any]:
    """Return what is in a folder or file of ours, of peft's, or of Lightning's.

    Raises:
        CheckpointError: there is nothing that is known, or it is damaged.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(f"`path` must exist, but `{path}` does not.")
    for is_one, look in _KINDS:
        if is_one(path):
            return {"path": str(path), **look(path)}
    raise CheckpointError(
        f"`{path}` must be the folder of an adapter, of a run or of a merged model, or a "
        f"checkpoint, but holds neither `{TENSORS}` nor `{_RUN}` nor `{RECORD}`."
    )


_RUN = "config.yaml"


def _is_adapter(path: Path) -> bool:
    return (path / TENSORS).exists() or (path / CONFIG).exists() or (path / THEIR_CONFIG).exists()


def _is_run(path: Path) -> bool:
    return (path / _RUN).is_file()


def _is_merged(path: Path) -> bool:
    return (path / RECORD).is_file()


def _is_checkpoint(path: Path) -> bool:
    return path.is_file() or (path / manifest.COMMIT).exists()


def _adapter(folder: Path) -> dict[str, Any]:
    data = read_tensors(folder)
    if (folder / CONFIG).exists():
        return _our_adapter(folder, data)
    if not (folder / THEIR_CONFIG).exists():
        raise CheckpointError(f"`{folder}` holds neither `{CONFIG}` nor `{THEIR_CONFIG}`.")
    return _their_adapter(folder, data)


def _our_adapter(folder: Path, data: bytes) -> dict[str, Any]:
    config = checked(folder, data)
    both = (folder / THEIR_CONFIG).exists()
    return {
        "kind": "adapter of lightning-peft" + (", also readable by peft" if both else ""),
        "name": config["name"],
        "methods": config["methods"],
        "base": config.get("base", {}),
        "in_place": config["in_place"],
        "trained_parameters": config.get("parameters"),
        **_tensors(parse(data, folder / TENSORS), len(data)),
        "checksum": "SHA-256 as saved",
        "fingerprint": config["fingerprint"],
        "written_by": f"lightning-peft {config.get('lightning_peft', '')}".strip(),
    }


def _their_adapter(folder: Path, data: bytes) -> dict[str, Any]:
    config = read_json(folder / THEIR_CONFIG)
    settings = Settings(config, str(folder / THEIR_CONFIG))
    spelling_of(settings)  # which refuses what is not known
    given = {k: v for k, v in sorted(config.items()) if v not in (None, False, {}, [], "")}
    return {
        "kind": "adapter of peft",
        "name": "default",
        "methods": [{"_target_": f"peft {config['peft_type']}", **given}],
        "base": {
            "class": (settings.any_of("auto_mapping", dict) or {}).get("base_model_class", ""),
            "name_or_path": settings.any_of("base_model_name_or_path", str) or "",
        },
        "in_place": settings.any_of("modules_to_save", list) or [],
        **_tensors(parse(data, folder / TENSORS), len(data)),
        "checksum": "none: peft writes no checksum",
        "fingerprint": None,
        "written_by": f"peft {config.get('peft_version', '')}".strip(),
    }


def _checkpoint(path: Path) -> dict[str, Any]:
    content = _content(path)
    record, state = record_of(content, path), content["state_dict"]
    size = sum(f.stat().st_size for f in path.rglob("*")) if path.is_dir() else path.stat().st_size
    tensors = {k: t for k, t in state.items() if isinstance(t, Tensor) and t.numel()}
    return {
        "kind": "checkpoint of lightning-peft",
        "name": record["name"],
        "methods": record["methods"],
        "base": content.get("hyper_parameters", {}).get("model", {}),
        "in_place": sorted(name for name in tensors if SLOT not in name.split(".")),
        **_tensors(tensors, size),
        "epoch": content.get("epoch"),
        "step": content.get("global_step"),
        "checksum": _checked_as(path),
        "fingerprint": record["fingerprint"],
        "written_by": f"lightning {content.get('pytorch-lightning_version', '')}".strip(),
    }


def _content(path: Path) -> dict[str, Any]:
    if path.is_dir():
        shards.require_complete(path)
        raise CheckpointError(
            f"`{path}` is a complete checkpoint in shards, one a process, which only the run itself"
            " can put together: look at the run's folder or at its `adapter/` instead."
        )
    return AtomicCheckpointIO().load_checkpoint(path)


def _checked_as(path: Path) -> str:
    known = manifest.read(manifest.manifest_path(path.resolve()))
    return "SHA-256 as saved" if known else "CRC-32 of the archive (no manifest beside it)"


def _run(folder: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load((folder / _RUN).read_text(encoding="utf-8"))
        method, model, data = (settings[group] for group in ("method", "model", "data"))
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise CheckpointError(f"`{folder / _RUN}` is no run's configuration: {error}.") from error
    adapter = _adapter(folder / "adapter") if (folder / "adapter").is_dir() else {}
    found = sorted((folder / "checkpoints").glob("*.ckpt"))
    return {
        "kind": "run",
        "title": settings.get("title") or "",
        "methods": list(method.values()),
        "base": model,
        "data": {key: value for key, value in data.items() if value is not None},
        "seed": settings.get("seed"),
        "checkpoints": {path.name: _briefly(path) for path in found},
        "adapter": adapter or "none: the fit did not end",
    }


def _briefly(path: Path) -> str:
    try:
        content = _content(path)
    except CheckpointError as error:
        return str(error)
    return f"epoch {content.get('epoch')}, step {content.get('global_step')}, {_checked_as(path)}"


def _merged(folder: Path) -> dict[str, Any]:
    record = read_json(folder / RECORD)
    return {"kind": "merged model, plain to transformers", **record}


def _tensors(tensors: Mapping[str, Tensor], size: int) -> dict[str, Any]:
    dtypes = Counter(str(t.dtype).removeprefix("torch.") for t in tensors.values())
    hosts = {_host(name) for name in tensors} - {""}
    return {
        "targets": dict(sorted(Counter(_end(host) for host in hosts).items())),
        "hosts": len(hosts),
        "tensors": len(tensors),
        "parameters": sum(t.numel() for t in tensors.values()),
        "bytes": size,
        "dtypes": dict(dtypes),
        "finite": all(t.isfinite().all().item() for t in tensors.values() if t.is_floating_point()),
    }


def _host(name: str) -> str:
    """Return the module that a tensor changes; empty for one that belongs to no single module."""
    found = _OURS.match(name) or _THEIRS.match(name)
    return (found[1] or "the model itself") if found else ""


def _end(host: str) -> str:
    """Return what hosts in different layers have in common."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", host)


_KINDS = (
    (_is_run, _run),
    (_is_adapter, _adapter),
    (_is_merged, _merged),
    (_is_checkpoint, _checkpoint),
)
