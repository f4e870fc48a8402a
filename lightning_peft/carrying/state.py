"""What a state must be to go into an adapter."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_peft.errors import AdapterError, near_misses


def check_state(own: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str) -> None:
    """Refuse a `state` that is not exactly what `own` tensors can hold.

    Raises:
        AdapterError: a tensor is missing, unexpected, misshapen, of another kind or not finite.
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
