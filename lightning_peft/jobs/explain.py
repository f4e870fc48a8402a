"""Hydra's errors in one sentence: what was wrong, and what there is to choose from."""

from collections.abc import Sequence

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_peft.errors import near_misses
from lightning_peft.jobs.conf import Conf, key_of


def explain(error: Exception, name: str, conf: Conf, overrides: Sequence[str]) -> str:
    """Return one sentence about an error of Hydra or OmegaConf, with its remedy.

    Args:
        error: What composing the configuration raised.
        name: The primary configuration.
        conf: The folders of configuration files.
        overrides: The command line's overrides.
    """
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _unknown_option(error.missing_cfg_file, conf)
    first = str(error).splitlines()[0]
    if isinstance(error, OverrideParseException):
        return f"`{error.override}` must be `name=value`, but cannot be read: {first}."
    if first.startswith(("Could not override", "Could not delete")):
        key = first.split("'")[1]
        similar = _similar(key, _known(name, conf, overrides))
        return f"`{key}` must be a setting, but there is none of that name.{similar}"
    return first


def _unknown_option(missing: str, conf: Conf) -> str:
    group, _, option = missing.rpartition("/")
    options = list(conf.options(group))
    close = near_misses(option, options)
    return f"`{group}` must be one of {', '.join(options)}, but is {option!r} instead.{close}"


def _similar(key: str, known: Sequence[str]) -> str:
    """Name settings like `key`: elsewhere under the same last name, or spelt much the same."""
    last = key.rpartition(".")[2]
    same = [name for name in known if name.rpartition(".")[2] == last]
    close = near_misses(same[0], same) if same else near_misses(key, known)
    return close or f" `+{key}=...` would add it."


def _known(name: str, conf: Conf, overrides: Sequence[str]) -> list[str]:
    """Return all settings of the configuration without the overrides of single values."""
    groups = conf.groups()
    try:
        config = conf.compose(name, [text for text in overrides if key_of(text) in groups])
    except (HydraException, OmegaConfBaseException):
        return groups
    return [*groups, *_leaves(config, "")]


def _leaves(config: DictConfig, prefix: str) -> list[str]:
    names = []
    for key in map(str, config):
        names.append(f"{prefix}{key}")
        unresolved = OmegaConf.is_missing(config, key) or OmegaConf.is_interpolation(config, key)
        if not unresolved and isinstance(config[key], DictConfig):
            names += _leaves(config[key], f"{prefix}{key}.")
    return names
