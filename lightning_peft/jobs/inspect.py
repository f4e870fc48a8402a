"""`job=inspect path=<...>`: what is in an adapter's folder, a checkpoint or a run."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_peft.config import TARGET, instantiate
from lightning_peft.errors import CheckpointError, ConfigError, PEFTError
from lightning_peft.files.adapter_folder import load_adapter
from lightning_peft.inspecting import inspect_path
from lightning_peft.jobs.bases import base_for
from lightning_peft.jobs.conf import key_of
from lightning_peft.jobs.job import Job
from lightning_peft.jobs.run_folder import resolved
from lightning_peft.models import ModelSource
from lightning_peft.module import PEFTModule
from lightning_peft.report import open_console, readable_bytes

_FORMATS = ("table", "json")


@dataclass(frozen=True, kw_only=True)
class Inspect(Job):
    """Show what is in a path; with `model=` also whether it fits that model."""

    path: str | None = None
    """Folder of an adapter (ours or peft's), of a run or of a merged model, or a checkpoint."""

    format: str = "table"
    """How to print it: table, or json for programs."""

    def run(self, config: DictConfig) -> None:
        if self.path is None or self.format not in _FORMATS:
            raise ConfigError(
                f"`path` must name what to inspect, but is {self.path}."
                if self.path is None
                else f"`job.format` must be table or json, but is {self.format!r} instead."
            )
        found = inspect_path(self.path)
        misfit = ""
        if any(key_of(text).partition(".")[0] == "model" for text in _overrides()):
            source = instantiate(resolved(config)["model"], "model")
            misfit = _misfit(source, Path(self.path).expanduser(), found)
            found["fits"] = misfit or f"yes: {source.name}"
        _show(found, open_console(), self.format)
        if misfit:
            raise CheckpointError(misfit)


def _overrides() -> list[str]:
    return [str(text) for text in HydraConfig.get().overrides.task]


def _misfit(source: ModelSource, path: Path, found: Mapping[str, Any]) -> str:
    """Return why what was found does not fit a model; empty when it does.

    Raises:
        ConfigError: the model cannot be loaded, or there is no adapter to fit.
    """
    folder = path / "adapter" if found["kind"] == "run" else path
    try:
        if found["kind"].startswith("checkpoint"):
            PEFTModule.load_from_checkpoint(path, model=source)
        elif folder.is_dir() and found["kind"] != "merged model, plain to transformers":
            load_adapter(base_for(source, folder), folder)
        else:
            raise ConfigError(f"`model` must not be given for a {found['kind']}.")
    except ConfigError:
        raise
    except PEFTError as error:
        return str(error)
    return ""


def _show(found: Mapping[str, Any], console: Console, form: str) -> None:
    if form == "json":
        console.print(json.dumps(found, indent=2, default=str), highlight=False, soft_wrap=True)
        return
    title = Text(f"{found['path']}: {found['kind']}")
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    table.add_column("", no_wrap=True, style="cyan")
    table.add_column(overflow="fold")
    for name, value in found.items():
        if name not in ("path", "kind"):
            table.add_row(name.replace("_", " "), Text(_readable(name, value)))
    console.print(table)


def _readable(name: str, value: Any) -> str:
    if name == "bytes":
        return readable_bytes(value)
    if name == "methods":
        return "\n".join(_method(spec) for spec in value)
    if name == "targets":
        return "\n".join(f"{target} ({count})" for target, count in value.items()) or "none"
    if name == "fingerprint":
        return f"{value['sha256'][:16]}… of {value['tensors']:,} tensors" if value else "none"
    if isinstance(value, Mapping):
        return "\n".join(f"{key}: {_readable(key, item)}" for key, item in value.items())
    if isinstance(value, list):
        return "\n".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _method(spec: Mapping[str, Any]) -> str:
    name = str(spec.get(TARGET, "")).rpartition(".")[2]
    settings = ", ".join(f"{k}={v!r}" for k, v in spec.items() if k != TARGET and v is not None)
    return f"{name}({settings})"
