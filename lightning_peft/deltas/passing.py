"""What a module receives, shown to a delta that acts later in the same call.

It is handed over within one call, for each thread by itself, and not kept: recomputation,
compilation and threads need nothing special.
"""

import secrets
import threading
from typing import Any

from torch import Tensor

_passing = threading.local()


def new_key() -> str:
    """Return a key for one handover."""
    return f"_{secrets.token_hex(8)}"


def show(key: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Note the first input of a call."""
    setattr(_passing, key, first_input(args, kwargs))


def shown(key: str, keep: bool = True) -> Any:
    """Return what was noted, None where nothing was; for the last time without `keep`."""
    x = getattr(_passing, key, None)
    if not keep:
        setattr(_passing, key, None)
    return x


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the first input of a call, whether it was given by its name or not."""
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x
