"""Writing the change of an adapter into the weights of its model, all or nothing."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

from torch import Tensor, nn

from lightning_peft.carrying.in_place import Parked
from lightning_peft.delta import Delta, NotMergeable, slot_of
from lightning_peft.merging.scaling import fold

Hosted = tuple[str, nn.Module, Delta]
Opened = Callable[[nn.Module], AbstractContextManager[Any]]
"""Makes a context within which a module's weights can be written."""


def fold_all(
    model: nn.Module, deltas: Sequence[Hosted], parked: Sequence[Hosted], opened: Opened
) -> list[tuple[Tensor, Tensor]]:
    """Fold deltas into the weights of their hosts.

    Args:
        model: which holds the hosts.
        deltas: of the methods.
        parked: what stands in for the model's own tensors.
        opened: is entered around each host while it is folded into.

    Returns:
        The tensors of the hosts, and what was in them before.

    Raises:
        NotMergeable: a delta cannot be folded in; nothing is changed.
    """
    before = [(t, t.data) for _, host, _ in (*deltas, *parked) for t in _tensors_of(host)]
    try:
        _refuse_shared(model, deltas)
        _refuse_mixed(deltas)
        for _, host, delta in (*parked, *deltas):
            with opened(host):
                fold(delta, host)
    except Exception:
        for tensor, data in before:
            tensor.data = data
        raise
    return before


def _tensors_of(module: nn.Module) -> list[Tensor]:
    own = [*module._parameters.values(), *module._buffers.values()]
    return [tensor for tensor in own if tensor is not None]


def _refuse_shared(model: nn.Module, deltas: Sequence[Hosted]) -> None:
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    for name, host, delta in deltas:
        shared = any(owners[id(p)] > 1 for p in host.parameters(recurse=False))
        if shared and not delta.merges_shared:
            raise NotMergeable(f"`{name}` shares its weight with another module.")


def _refuse_mixed(deltas: Sequence[Hosted]) -> None:
    # Folded one after another, changes that build on each other would give something else.
    for name, host, delta in deltas:
        every = [cast(Delta, other) for other in slot_of(host).values()]
        others = [d for d in every if d.active and d is not delta and not _has_biases_alone(d)]
        if others and not all(d.additive for d in (delta, *others)):
            raise NotMergeable(
                f"`{name}` is changed by {type(delta).__name__} and by "
                f"{type(others[0]).__name__}, which do not simply add up: remove one of them."
            )


def _has_biases_alone(delta: Delta) -> bool:
    """Whether it is a moved-out tensor that changes of weights do not meet."""
    return isinstance(delta, Parked) and set(delta.state_dict()) <= {"bias"}
