"""What a state must be to go into an adapter."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_peft.errors import AdapterError, near_misses

DEPENDS_ON = "depends_on_"
"""What the name of a buffer starts with that identifies another adapter, whose name follows."""


def check_state(own: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str) -> None:
    """Refuse a `state` that is not exactly what `own` tensors can hold.

    Raises:
        AdapterError: a tensor is missing, unexpected, misshapen, of another kind or not finite; or
            an adapter that it was trained on is another one here.
    """
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if extra:
        raise AdapterError(
            f"`{extra[0]}` is unexpected in {where} ({len(extra)} in all)."
            f"{near_misses(extra[0], missing)}"
        )
    if missing:
        raise AdapterError(f"`{missing[0]}` is missing in {where} ({len(missing)} in all).")
    for name, tensor in own.items():
        _check_tensor(name, tensor, state[name])
        _check_dependence(name, tensor, state[name], where)


def _check_tensor(name: str, own: Tensor, new: Any) -> None:
    if not isinstance(new, Tensor):
        raise AdapterError(f"`{name}` must be a tensor, but is {type(new).__name__} instead.")
    if own.shape != new.shape:
        raise AdapterError(
            f"`{name}` must have shape {tuple(own.shape)}, but has {tuple(new.shape)} instead."
        )
    if own.is_floating_point() != new.is_floating_point():
        raise AdapterError(f"`{name}` must be {own.dtype}, but is {new.dtype} instead.")
    if new.is_floating_point() and not new.isfinite().all():
        raise AdapterError(f"`{name}` holds NaN or infinite values.")


def _check_dependence(name: str, own: Tensor, new: Tensor, where: str) -> None:
    last = name.rpartition(".")[2]
    if not last.startswith(DEPENDS_ON) or own.is_meta or torch.equal(own.cpu(), new.cpu()):
        return
    other = last.removeprefix(DEPENDS_ON)
    raise AdapterError(
        f"The state of {where} was trained on another adapter `{other}` than the one of that name "
        "that the model carries: load the one that it was trained on."
    )
