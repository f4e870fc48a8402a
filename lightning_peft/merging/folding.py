"""Writing the change of an adapter into the weights of its model, all or nothing."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from lightning_peft.carrying.in_place import Parked
from lightning_peft.carrying.registry import adapters_of
from lightning_peft.delta import Delta, NotMergeable, plain_name, slot_of
from lightning_peft.merging.scaling import fold

if TYPE_CHECKING:
    from lightning_peft.adapter import Adapter

Hosted = tuple[str, nn.Module, Delta]
Weight = tuple[nn.Module, str, Tensor, Tensor]
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
    weights = [
        (host, name, tensor, tensor.data)
        for _, host, _ in (*deltas, *parked)
        for name, tensor in host._parameters.items()
        if tensor is not None
    ]
    try:
        _refuse_shared(model, deltas)
        _refuse_mixed(deltas)
        for _, host, delta in (*parked, *deltas):
            with opened(host):
                fold(delta, host)
        _refuse_owned(_others(model, (*parked, *deltas)), _rewritten(weights))
    except Exception:
        for tensor, data in before:
            tensor.data = data
        raise
    forget_base(model)
    return before


def forget_base(model: nn.Module) -> None:
    """Let each adapter look at its base anew, which has got other weights."""
    for adapter in adapters_of(model).values():
        adapter.__dict__.pop("base_fingerprint", None)


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


def _others(model: nn.Module, folded: Sequence[Hosted]) -> list["Adapter"]:
    """Return the adapters that act, or will again after `disabled()`, and are not folded."""
    own = {id(delta) for _, _, delta in folded}
    present = [a for a in adapters_of(model).values() if a.active or a.is_disabled]
    return [a for a in present if not any(id(slot[key]) in own for slot, key in a.placed())]


def _rewritten(weights: Sequence[Weight]) -> set[int]:
    """Return the identities of the parameters that have other values than before."""
    return {
        id(tensor)
        for host, name, tensor, data in weights
        if host._parameters[name] is not tensor or tensor.data_ptr() != data.data_ptr()
    }


def _refuse_owned(others: Sequence["Adapter"], rewritten: set[int]) -> None:
    # In the model's own tensors theirs would change; moved out, they would hide the change.
    for other in others:
        for name, tensor in other.model.named_parameters():
            if plain_name(name) in other.in_place and id(tensor) in rewritten:
                raise NotMergeable(
                    f"`{plain_name(name)}` would be rewritten, but is trained in place by adapter "
                    f"`{other.name}`, which acts too: deactivate that one first, or merge it."
                )


def _has_biases_alone(delta: Delta) -> bool:
    """Whether it is moved-out biases: its own are folded first, others' are looked at by name."""
    return isinstance(delta, Parked) and set(delta.state_dict()) <= {"bias"}
