"""Which of the adapters that a model carries act, on all rows of a batch or on some."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_peft.carrying.mixing import scene_of
from lightning_peft.carrying.registry import adapters_of, carried, refuse_clash, registry_of
from lightning_peft.errors import AdapterError, near_misses
from lightning_peft.ops.rows import Plan

if TYPE_CHECKING:
    from lightning_peft.adapter import Adapter


def switch(model: nn.Module, names: str | Sequence[str]) -> None:
    """Let the adapters `names` act, in the order of their injection, and no others.

    It exchanges pointers: no tensor is copied and nothing is compiled anew. Which adapters are
    trainable does not change.

    Args:
        model: which carries the adapters.
        names: one adapter, several whose changes come one after another, or `()` for the base.

    Raises:
        AdapterError: there is no adapter of that name, or two train the same weight in place; what
            acts is then what acted before.
    """
    wanted = {names} if isinstance(names, str) else set(names)
    present = carried(model)
    _refuse_unknown(wanted, present)
    refuse_clash([present[name] for name in wanted])
    for name, adapter in present.items():
        if adapter.is_disabled or adapter.active != (name in wanted):
            adapter.require_switchable("switch()")
    for name, adapter in present.items():
        if name not in wanted:
            adapter.deactivate()
    for name in wanted:
        present[name].activate()


@contextmanager
def mixed(model: nn.Module, rows: Sequence[str | Sequence[str] | None]) -> Iterator[nn.Module]:
    """Within this context each row of a batch goes through its own adapter, or through none.

        with mixed(model, ["a", None, "b", "a"]):
            loss = model(**batch).loss
            loss.backward()

    Which adapters are active outside of it does not matter, nor whether they are trainable. The
    backward pass belongs inside where layers recompute what they gave (gradient checkpointing). A
    row may be several rows that follow one another, as `generate` has it with beams.

    Args:
        model: which carries the adapters.
        rows: for each row of the batch the name of an adapter, several whose changes come one
            after another, or None for the base.

    Raises:
        AdapterError: there is no adapter of that name, one is within its `disabled()`, or two of
            one row train the same weight in place; and within the context, a module gets a batch of
            another number of rows, or cannot treat its rows differently.
    """
    keys = [_key(row) for row in rows]
    if not keys:
        raise AdapterError("`rows` must hold a name, or None, for each row, but is empty.")
    names = {name for key in keys for name in key}
    _refuse_unknown(names, carried(model))
    carrier = _carrier(model, names)
    present = registry_of(carrier)
    for key in dict.fromkeys(keys):
        refuse_clash([present[name] for name in key])
        if off := [name for name in key if present[name].is_disabled]:
            raise AdapterError(f"`mixed` needs adapter `{off[0]}`, but is within its `disabled()`.")
    plan = Plan(keys, next((p.device for p in carrier.parameters()), torch.device("cpu")))
    with scene_of(carrier, present, plan.distinct).entered(plan):
        yield model


def _key(row: str | Sequence[str] | None) -> tuple[str, ...]:
    if row is None:
        return ()
    return (row,) if isinstance(row, str) else tuple(row)


def _carrier(model: nn.Module, names: set[str]) -> nn.Module:
    """Return the one module that all of the adapters were injected into."""
    if names <= model.__dict__.get("_adapters", {}).keys():
        return model
    present = adapters_of(model)
    carriers = {id(a.model): a.model for n, a in present.items() if n in names or not names}
    if len(carriers) > 1:
        raise AdapterError(
            "`mixed` takes adapters of one model, but these were injected into "
            f"{len(carriers)} modules of it: mix each by itself."
        )
    return next(iter(carriers.values()), model)


def _refuse_unknown(names: set[Any], present: Mapping[str, "Adapter"]) -> None:
    if unknown := sorted(names - present.keys(), key=str):
        raise AdapterError(
            f"The model carries no adapter `{unknown[0]}`."
            f"{near_misses(str(unknown[0]), present) or f' It carries {sorted(present)}.'}"
        )
