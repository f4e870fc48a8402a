"""Hyper-parameters in containers that a safe load accepts, and back."""

from argparse import Namespace
from collections.abc import Mapping, MutableMapping
from pathlib import PurePath
from typing import Any

from lightning.fabric.utilities.data import AttributeDict

_SAVED, _TYPE = "hyper_parameters", "hparams_type"


def make_plain(checkpoint: MutableMapping[str, Any]) -> bool:
    """Make the hyper-parameters in a Lightning checkpoint plain.

    Returns:
        Whether those of the module came from OmegaConf, whose class a safe load refuses.
    """
    for key in [key for key in checkpoint if key.endswith(_SAVED)]:
        checkpoint[key] = plain(checkpoint[key])
    types = [checkpoint.pop(key) for key in list(checkpoint) if key.endswith(_TYPE)]
    return any(cls.__module__.startswith("omegaconf.") for cls in types)


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
    """Return `value` with its containers, paths and numbers made those of plain Python."""
    if isinstance(value, Namespace):
        return plain(vars(value))
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, PurePath):
        return str(value)
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (list, tuple)) or type(value).__name__ == "ListConfig":
        items = map(plain, value)
        return tuple(items) if type(value) is tuple else list(items)
    return value
