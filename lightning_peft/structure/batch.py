"""Which modules of a model receive a batch with its rows first: found by running it twice.

Each pretrained model inside runs on one row and on that row twice. What doubles in its first
dimension has the rows there, several to a row where windows or tokens stand end to end. Relative
positions have no rows, some models put the tokens first, and experts get tokens in an order of
their own: what acts there by rows must act around it.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.errors import TargetError
from lightning_peft.ops.rows import first_tensor
from lightning_peft.structure.anatomy import base_modules
from lightning_peft.structure.probe import pretrained, run

Shapes = dict[str, torch.Size]


def rowless(model: nn.Module) -> dict[str, str]:
    """Return the modules without rows first, each with the next one around it that has them.

    Modules that the run does not reach, or that lie outside of pretrained models, are taken to have
    their rows first.
    """
    found: dict[str, str] = {}
    for prefix, inner in pretrained(model):
        with contextlib.suppress(TargetError):
            once, twice = _shapes(inner, 1), _shapes(inner, 2)
            first = {n for n in once if n in twice and _has_rows_first(once[n], twice[n])}
            first -= _routed(once, first)
            lost = [name for name in once if name not in first]
            found |= {_join(prefix, n): _join(prefix, _around(n, first)) for n in lost}
    return found


def _shapes(model: nn.Module, times: int) -> Shapes:
    """Return the shape of the first tensor that each module receives."""
    shapes: Shapes = {}

    @contextlib.contextmanager
    def watched() -> Iterator[None]:
        shapes.clear()
        hooks = [model.register_forward_pre_hook(_repeating(times), with_kwargs=True)]
        for name, module in base_modules(model):
            hooks.append(module.register_forward_pre_hook(_noting(name, shapes), with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    run(model, around=watched)
    return shapes


def _repeating(times: int) -> Any:
    def repeat(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Any:
        many = {
            name: x.repeat_interleave(times, 0) if isinstance(x, Tensor) else x
            for name, x in kwargs.items()
        }
        return args, many

    return repeat


def _noting(name: str, shapes: Shapes) -> Any:
    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = first_tensor((args, kwargs))
        shapes[name] = torch.Size() if x is None else x.shape

    return note


def _has_rows_first(once: torch.Size, twice: torch.Size) -> bool:
    if once == twice:
        return len(once) > 1 and once[0] == 1  # what holds for all rows
    return len(once) > 0 and twice == torch.Size([2 * once[0], *once[1:]])


def _routed(once: Shapes, first: set[str]) -> set[str]:
    """Return the modules that get single tokens, and not those of all rows end to end."""
    rows = [shape for name, shape in once.items() if name in first and shape[0] == 1]
    whole = {math.prod(tokens) for s in rows for tokens in (s[1:-1], s[2:])}
    flat = {name for name in first if len(once[name]) == 2 and once[name][0] != 1}
    chosen = {name for name in flat if ".experts." in f".{name}."}
    return chosen | {name for name in flat if once[name][0] not in whole}


def _around(name: str, first: set[str]) -> str:
    while name and name not in first:
        name = name.rpartition(".")[0]
    return name


def _join(*parts: str) -> str:
    return ".".join(filter(None, parts))
