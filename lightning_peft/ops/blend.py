"""A part of the way from what a module computes to what a delta makes of it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_peft.errors import AdapterError


def blend(base: Any, changed: Any, share: float) -> Any:
    """Return `base + share · (changed - base)` of tensors, or of alike collections of them.

    What is no floating-point tensor is taken from `changed`.

    Raises:
        AdapterError: a tensor has another shape than before, so that there is no way between.
    """
    if changed is base:
        return changed
    if isinstance(changed, Tensor) and isinstance(base, Tensor):
        return _between(base, changed, share)
    if isinstance(changed, Mapping) and isinstance(base, Mapping):
        mixed = {key: blend(base.get(key), value, share) for key, value in changed.items()}
        return type(changed)(**mixed) if mixed else changed
    if isinstance(changed, tuple | list) and isinstance(base, tuple | list):
        pairs = [blend(old, new, share) for old, new in zip(base, changed, strict=False)]
        mixed_items = [*pairs, *changed[len(pairs) :]]
        named = hasattr(changed, "_fields")
        return type(changed)(*mixed_items) if named else type(changed)(mixed_items)
    return changed


def _between(base: Tensor, changed: Tensor, share: float) -> Tensor:
    if not changed.is_floating_point():
        return changed
    if not changed.is_nested and base.shape != changed.shape:
        raise AdapterError(
            f"A change from shape {tuple(base.shape)} to {tuple(changed.shape)} cannot be scaled."
        )
    return base + (changed - base) * share
