"""Rebuilding a foreign LightningModule from what was trained in it."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl

from lightning_peft.delta import SLOT, plain_name
from lightning_peft.errors import CheckpointError
from lightning_peft.files.checkpoint_io import AtomicCheckpointIO
from lightning_peft.training import checkpoint as content
from lightning_peft.training.hooks import adopt_late
from lightning_peft.training.injection import Injection
from lightning_peft.training.plain import saved_settings

_Module = TypeVar("_Module", bound=pl.LightningModule)


def load_foreign(
    cls: type[_Module], path: str | Path, map_location: Any, arguments: Mapping[str, Any]
) -> _Module:
    """Build the module with the saved hyper-parameters and `arguments`, inject, and load."""
    from lightning_peft.module import PEFTModule  # slow to import

    if issubclass(cls, PEFTModule):
        own: Any = cls
        return own.load_from_checkpoint(path, map_location=map_location, **arguments)
    loaded = AtomicCheckpointIO().load_checkpoint(path, map_location)
    record = content.record_of(loaded, path)
    given = {**_saved_arguments(cls, loaded, record), **arguments}
    _require_all(cls, given, path)
    module: Any = cls(**given)
    _build(module, loaded["state_dict"])
    adopt_late(module, Injection.from_spec(record))
    module.configure_model()
    module.on_load_checkpoint(loaded)
    module.load_state_dict(loaded["state_dict"])
    return module


def _require_all(cls: type, given: Mapping[str, Any], path: str | Path) -> None:
    for name, parameter in inspect.signature(cls).parameters.items():
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if named and parameter.default is parameter.empty and name not in given:
            raise CheckpointError(
                f"`{name}` of {cls.__name__} is not in `{path}`: give it, as in "
                f"`PEFT.load_from_checkpoint({cls.__name__}, path, {name}=...)`."
            )


def _build(module: pl.LightningModule, state: Mapping[str, Any]) -> None:
    """Run the hooks in which a Trainer would let the module build its model, if it did not yet."""
    for hook in (module.configure_model, lambda: module.setup(stage="predict")):
        if not _is_built(module, state):
            hook()


def _is_built(module: pl.LightningModule, state: Mapping[str, Any]) -> bool:
    names = {plain_name(name) for name, _ in module.named_modules()}
    names |= {plain_name(name) for name in module.state_dict()}
    needed = {name.partition(f"{SLOT}.")[0].rstrip(".") for name in state.keys() - {content.REMEDY}}
    return needed <= names


def _saved_arguments(
    cls: type[pl.LightningModule], loaded: Mapping[str, Any], record: Mapping[str, Any]
) -> dict[str, Any]:
    saved = saved_settings(loaded, record["omegaconf"])
    parameters = inspect.signature(cls.__init__).parameters
    open_ended = [p for p in parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    whole = str(loaded.get(cls.CHECKPOINT_HYPER_PARAMS_NAME))
    if whole in parameters and parameters[whole] not in open_ended:
        return {whole: saved}
    return {str(name): saved[name] for name in saved if open_ended or name in parameters}
