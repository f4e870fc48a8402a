"""Hyper-parameters in containers that a safe load accepts, and back."""

from argparse import Namespace
from collections.abc import Mapping, MutableMapping
from pathlib import PurePath
from typing import Any

from lightning.fabric.utilities.data import AttributeDict
from torch import nn

_SAVED, _TYPE = "hyper_parameters", "hparams_type"


def make_plain(checkpoint: MutableMapping[str, Any]) -> bool:
    """Make the hyper-parameters in a Lightning checkpoint plain.

    Returns:
        Whether those of the module came from OmegaConf, whose class a safe load refuses.
    """
    for key in [key for key in checkpoint if key.endswith(_SAVED)]:
        checkpoint[key] = plain(checkpoint[key])
    types = {key: checkpoint.pop(key) for key in list(checkpoint) if key.endswith(_TYPE)}
    return getattr(types.get(_TYPE), "__module__", "").startswith("omegaconf.")


def saved_settings(checkpoint: Mapping[str, Any], omegaconf: bool) -> Any:
    """Return the module's hyper-parameters; their parts can be read by key and by attribute."""
    saved = checkpoint.get(_SAVED, {})
    if not omegaconf:
        return _attributes(saved)
    from omegaconf import OmegaConf

    return OmegaConf.create(saved)


def _attributes(value: Any) -> Any:
    if isinstance(value, dict):
        return AttributeDict({key: _attributes(item) for key, item in value.items()})
    return [_attributes(item) for item in value] if isinstance(value, list) else value


def plain(value: Any) -> Any:
    """Return `value` with its containers, paths and numbers made those of plain Python.

    Modules in a dictionary are left out: a checkpoint of what was trained must not hold the base.
    """
    if isinstance(value, Namespace):
        return plain(vars(value))
    if isinstance(value, Mapping):
        items = value.items()
        return {key: plain(item) for key, item in items if not isinstance(item, nn.Module)}
    if isinstance(value, PurePath):
        return str(value)
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (list, tuple)) or type(value).__name__ == "ListConfig":
        return (tuple if type(value) is tuple else list)(map(plain, value))
    return value
