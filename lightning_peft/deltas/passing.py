"""What a module receives, shown to a delta that acts later in the same call.

It is handed over within one call, for each thread by itself, and not kept: recomputation,
compilation and threads need nothing special. In a batch whose rows have different adapters a delta
may act on some rows after others; each gets what was noted of its own.
"""

import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

_passing = threading.local()


@contextmanager
def among(rows: tuple[str, ...]) -> Iterator[None]:
    """Within this context deltas act on the rows of a mixed batch that have these adapters."""
    outer = acting_rows()
    _passing.rows = rows
    try:
        yield
    finally:
        _passing.rows = outer


def acting_rows() -> tuple[str, ...] | None:
    """Return the adapters of the rows that deltas act on; None where it is the whole batch."""
    return getattr(_passing, "rows", None)


def new_key() -> str:
    """Return a key for one handover."""
    return f"_{secrets.token_hex(8)}"


def show(key: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Note the first input of a call."""
    setattr(_passing, _of_rows(key), first_input(args, kwargs))


def shown(key: str, keep: bool = True) -> Any:
    """Return what was noted, None where nothing was; for the last time without `keep`."""
    key = _of_rows(key)
    x = getattr(_passing, key, None)
    if not keep:
        setattr(_passing, key, None)
    return x


def _of_rows(key: str) -> str:
    rows = acting_rows()
    return key if rows is None else f"{key}_{'/'.join(rows)}"


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the first input of a call, whether it was given by its name or not."""
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x
