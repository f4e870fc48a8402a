"""A run's folder: everything that one run leaves behind, and nothing elsewhere."""

import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_peft.config import MISSING
from lightning_peft.errors import ConfigError
from lightning_peft.jobs.saved import CONFIG
from lightning_peft.redact import redact, redact_arguments

FOLDER_VARIABLE = "LIGHTNING_PEFT_RUN_FOLDER"
"""Tells the processes that Lightning starts which folder the first one made."""

_PACKAGES = ("lightning-peft", "lightning", "torch", "transformers", "datasets", "torchmetrics")


@dataclass(frozen=True)
class RunFolder:
    """The paths in a run's folder."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved settings, secrets hidden."""
        return self.path / CONFIG

    @property
    def checkpoints(self) -> Path:
        """Best and last checkpoint."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The adapter to share."""
        return self.path / "adapter"

    @property
    def metrics(self) -> Path:
        """What was logged, step by step."""
        return self.path / "metrics.csv"

    @property
    def curves(self) -> Path:
        """A plot of the metrics."""
        return self.path / "curves.png"

    @rank_zero_only
    def describe(self, settings: Mapping[str, Any]) -> None:
        """Write `config.yaml`, which repeats the run, and `environment.json`.

        What a run that is resumed wrote there before is kept under a number: `config.1.yaml`.
        """
        # The folder's own name stays out, so that a copy of it, or a repetition, finds its own.
        text = yaml.safe_dump({**redact(settings), "run": None, "folder": None}, sort_keys=False)
        environment = json.dumps(_environment(settings["seed"]), indent=2) + "\n"
        for file, content in ((self.config, text), (self.path / "environment.json", environment)):
            _keep_earlier(file)
            file.write_text(content, encoding="utf-8")


def resolved(config: DictConfig) -> dict[str, Any]:
    """Return the configuration in plain containers, without interpolations.

    Local files and folders become absolute paths, so that a run can be taken up from anywhere.

    Raises:
        ConfigError: An interpolation `${...}` leads nowhere.
    """
    try:
        settings: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"`{error.full_key}` cannot be resolved: {reason}.") from error
    for group, key in (("model", "name"), ("data", "path")):
        if key in settings[group]:
            settings[group][key] = _absolute(settings[group][key])
    if settings["model"].get("trained"):
        settings["model"]["trained"] = _absolute(settings["model"]["trained"])
    return {str(key): value for key, value in settings.items()}


def existing(config: DictConfig, job: str) -> RunFolder:
    """Return the folder that `run=` names.

    Raises:
        ConfigError: none is named.
    """
    if config.run is None:
        raise ConfigError(f"`run` must be the folder of an earlier run: job={job} run=<folder>.")
    return RunFolder(Path(config.run))


@contextmanager
def created(settings: Mapping[str, Any]) -> Iterator[RunFolder]:
    """Make the folder of a new run; when what follows fails and left nothing in it, remove it.

    Raises:
        ConfigError: the folder exists, cannot be made, or the processes would not agree on it.
    """
    if getattr(rank_zero_only, "rank", 0):
        yield RunFolder(_shared(settings))
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # set by torchrun; Lightning does it later
        os.environ.pop(FOLDER_VARIABLE, None)
        _shared(settings)
    folder = make(settings)
    os.environ[FOLDER_VARIABLE] = str(folder.absolute())
    try:
        yield RunFolder(folder)
    except BaseException:
        if not any(path.name in (CONFIG, "checkpoints") for path in folder.iterdir()):
            shutil.rmtree(folder)
        raise


def title(settings: Mapping[str, Any]) -> str:
    """Return the run's title: the one that was given, or its methods and data."""
    if settings["title"]:
        return str(settings["title"])
    data = settings["data"]
    places = [data.get(key) for key in ("path", "hub", "source") if data.get(key)]
    place = next(iter(places), "data")
    place = next(iter(place.values())) if isinstance(place, dict) else place
    return "-".join([*settings["method"], Path(str(place)).stem])


def _absolute(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _absolute(item) for key, item in value.items()}
    if not isinstance(value, str) or value in ("", MISSING):
        return value
    path = Path(value).expanduser()
    # `xquad.{language}.json` and `part*.jsonl` stand for files that exist.
    fills_in = any(sign in path.name for sign in "{*?[") and path.parent.is_dir()
    return str(path.absolute()) if path.exists() or fills_in else value


def _keep_earlier(file: Path) -> None:
    if file.exists():
        number = next(n for n in itertools.count(1) if not _numbered(file, n).exists())
        file.rename(_numbered(file, number))


def _numbered(file: Path, number: int) -> Path:
    return file.with_name(f"{file.stem}.{number}{file.suffix}")


def _shared(settings: Mapping[str, Any]) -> Path:
    """Return the folder that the first process makes."""
    folder = os.environ.get(FOLDER_VARIABLE) or settings["folder"]
    if folder is None:
        raise ConfigError(
            "`folder` must be given when the processes are started by torchrun or SLURM, so that "
            "all of them write to the same place: folder=runs/<name>."
        )
    return Path(folder)


def make(settings: Mapping[str, Any]) -> Path:
    """Make a new folder: the one that `folder` names, else one with the date and the title.

    Raises:
        ConfigError: It exists, or cannot be made.
    """
    given = settings["folder"]
    folder = Path(given).expanduser() if given else _new_name(settings)
    for number in range(2, 100):
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if given:
                raise ConfigError(
                    f"`folder` must not exist yet, but {str(folder)!r} does: choose another, or "
                    f"continue that run with `job=resume run={folder}`."
                ) from None
            folder = _new_name(settings).with_name(f"{_new_name(settings).name}-{number}")
        except OSError as error:
            raise ConfigError(f"`folder` cannot be made: {error}.") from error
    raise ConfigError(f"`folder` must be given, since {str(folder)!r} and others like it exist.")


def _new_name(settings: Mapping[str, Any]) -> Path:
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in title(settings))
    if HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN:
        return Path(HydraConfig.get().sweep.dir) / f"{HydraConfig.get().job.num}-{name}"
    now = datetime.datetime.now().astimezone()
    return Path("runs") / f"{now:%Y-%m-%d_%H-%M-%S}-{name}"


def _environment(seed: int) -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": redact_arguments(["lightning-peft", *sys.argv[1:]]),
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "seed": seed,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": gpus,
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def _git_commit() -> str | None:
    """Return the commit of the working folder's repository, with a + where it was changed."""
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
