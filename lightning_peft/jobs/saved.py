"""`run=<folder>`: a saved configuration, with nothing but the command line's overrides on top.

Hydra composes its own defaults first, so an override of the saved values would meet the wrong
ones. Here the saved configuration becomes Hydra's primary one, and an override that chooses an
option (`trainer=gpu`) replaces that part as a whole.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from lightning_peft.errors import ConfigError
from lightning_peft.jobs.conf import Conf, key_of

CONFIG = "config.yaml"


def requested(overrides: Sequence[str]) -> Path | None:
    """Return the folder that the last `run=` among `overrides` names, if there is one."""
    values = [text.partition("=")[2] for text in overrides if key_of(text) == "run"]
    value = values[-1].strip("'\"") if values else ""
    return None if value in ("", "null") else Path(value).expanduser()


def store(name: str, folder: Path, overrides: Sequence[str], conf: Conf) -> list[str]:
    """Register a run's configuration with Hydra as the primary configuration `name`.

    Returns:
        The overrides that are left for Hydra: values, and no choices of options.

    Raises:
        ConfigError: `folder` is not a run's, or an override cannot change a saved run.
    """
    settings = read(folder)
    groups = conf.groups()
    choices = [text for text in overrides if key_of(text) in groups]
    for text in choices:
        settings |= _option(text, conf)
    # A folder can come from a stranger: what may be imported is for the command line to say.
    settings |= {"run": str(folder), "folder": None, "allow": []}
    primary = yaml.safe_load((conf.own / "train.yaml").read_text(encoding="utf-8"))
    hydra_own = [part for part in primary["defaults"] if "hydra/" in str(part)]
    # Ours last: what stands under `hydra` could make Hydra itself import and call anything.
    node = {**settings, "defaults": ["_self_", *hydra_own], "hydra": primary["hydra"]}
    ConfigStore.instance().store(name, OmegaConf.create(node))
    return [text for text in overrides if text not in choices and key_of(text) != "run"]


def read(folder: Path) -> dict[str, Any]:
    """Return a run's saved settings.

    Raises:
        ConfigError: `folder` holds none, or they cannot be read.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise ConfigError(
            f"`run` must be the folder of an earlier run, but {str(folder)!r} holds no `{CONFIG}`."
        )
    try:
        text = file.read_text(encoding="utf-8")
        settings = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"`{file}` must be YAML, but cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"`{file}` must hold settings by name, but does not.")
    if "${" in text:  # `${oc.env:...}` would send a secret of this machine to wherever it says
        raise ConfigError(f"`{file}` must hold resolved values, but holds an interpolation `${{`.")
    return settings


def _option(text: str, conf: Conf) -> dict[str, Any]:
    """Return what the option of a group contributes by itself, `trainer=gpu` for instance."""
    if key_of(text) == "experiment":
        raise ConfigError(
            "`experiment` must not be given together with `run`, since it would replace most of "
            "the saved settings: give single settings instead."
        )
    ConfigStore.instance().store("nothing", {})
    config = conf.compose("nothing", [f"+{text.lstrip('+')}"])
    return {str(key): value for key, value in config.items()}
