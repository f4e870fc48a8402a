"""Which of the adapters that a model carries act."""

from collections.abc import Sequence

from torch import nn

from lightning_peft.errors import AdapterError, near_misses
from lightning_peft.registry import adapters_of, refuse_clash, registry_of


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
    present = registry_of(model) if "_adapters" in model.__dict__ else adapters_of(model)
    if unknown := sorted(wanted - present.keys()):
        raise AdapterError(
            f"The model carries no adapter `{unknown[0]}`."
            f"{near_misses(unknown[0], present) or f' It carries {sorted(present)}.'}"
        )
    refuse_clash([present[name] for name in wanted])
    for name, adapter in present.items():
        if name not in wanted:
            adapter.deactivate()
    for name in wanted:
        present[name].activate()
