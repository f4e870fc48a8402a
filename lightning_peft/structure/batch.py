"""Which modules of a model receive a batch with its rows first: found by running it twice.

Each pretrained model inside runs on one row and on that row twice. What doubles in its first
dimension has the rows there, several to a row where windows or tokens stand end to end. Relative
positions have no rows, some models put the tokens first, and experts get tokens in an order of
their own: what acts there by rows must act around it.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.errors import AdapterError, TargetError
from lightning_peft.ops.rows import first_tensor
from lightning_peft.structure.anatomy import base_modules, under
from lightning_peft.structure.probe import pretrained, run

Shapes = dict[str, list[torch.Size]]
"""Of the first tensor in each call of a module; empty where there is none."""


def rowless(model: nn.Module) -> dict[str, str]:
    """Return the modules without rows first, each with the next one around it that has them.

    So has what is not called, since its holder reads its weights. Parts of the model that the run
    does not reach, or that lie outside of pretrained models, are taken to have their rows first.

    Raises:
        AdapterError: an attention outside of pretrained models says that it has not.
    """
    found: dict[str, str] = {}
    _refuse_tokens_first(model)
    for prefix, inner in pretrained(model):
        with contextlib.suppress(TargetError):
            once, twice = _shapes(inner, 1), _shapes(inner, 2)
            first = {n for n, calls in once.items() if _have_rows_first(calls, twice.get(n, []))}
            first -= _routed(once, first)
            lost = {name for name in once if name not in first} | _read(inner, set(once))
            found |= {_join(prefix, n): _join(prefix, _around(n, first)) for n in lost}
    return found


def _refuse_tokens_first(model: nn.Module) -> None:
    known = tuple(prefix for prefix, _ in pretrained(model))
    for name, module in base_modules(model):
        tokens_first = isinstance(module, nn.MultiheadAttention) and not module.batch_first
        if tokens_first and "" not in known and not under(name, known):
            raise AdapterError(
                f"The rows of a batch cannot be mixed, since `{name}` takes the tokens before the "
                "rows: build it with batch_first=True."
            )


def _shapes(model: nn.Module, times: int) -> Shapes:
    """Return the shapes of the first tensor that each module receives."""
    shapes: Shapes = {}

    @contextlib.contextmanager
    def watched() -> Iterator[None]:
        shapes.clear()
        hooks = [model.register_forward_pre_hook(_repeating(times), with_kwargs=True)]
        for name, module in base_modules(model):
            hooks.append(
                module.register_forward_pre_hook(_noting(name, shapes, times), with_kwargs=True)
            )
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


def _noting(name: str, shapes: Shapes, times: int) -> Any:
    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = first_tensor((args, kwargs))
        # Positions, which one row may have for all, are told from a shared state by their kind.
        shared = x is None or (x.is_floating_point() and x.dim() > 1 and len(x) == 1 < times)
        shapes.setdefault(name, []).append(torch.Size() if shared or x is None else x.shape)

    return note


def _have_rows_first(once: Sequence[torch.Size], twice: Sequence[torch.Size]) -> bool:
    return len(once) == len(twice) and all(map(_has_rows_first, once, twice))


def _has_rows_first(once: torch.Size, twice: torch.Size) -> bool:
    if once == twice:
        return len(once) > 1 and once[0] == 1  # what holds for all rows
    return len(once) > 0 and twice == torch.Size([2 * once[0], *once[1:]])


def _routed(once: Shapes, first: set[str]) -> set[str]:
    """Return the modules that get single tokens, and not those of all rows end to end."""
    rows = [shape for name in first for shape in once[name] if shape[0] == 1]
    whole = {math.prod(tokens) for s in rows for tokens in (s[1:-1], s[2:])}
    flat = {n: s[0] for n in first for s in once[n] if len(s) == 2 and s[0] != 1}
    return {n for n, count in flat.items() if ".experts." in f".{n}." or count not in whole}


def _read(model: nn.Module, called: set[str]) -> set[str]:
    """Return the modules that are not called, by whose holders their weights are read instead."""
    modules = dict(base_modules(model))
    found = set()
    for name in [n for n, m in modules.items() if m._parameters and n not in called]:
        holder = name.rpartition(".")[0]
        while holder and isinstance(modules[holder], nn.ModuleList | nn.ModuleDict):
            holder = holder.rpartition(".")[0]
        if holder in called or ".experts." in f".{name}.":
            found.add(name)
    return found


def _around(name: str, first: set[str]) -> str:
    while name and name not in first:
        name = name.rpartition(".")[0]
    return name


def _join(*parts: str) -> str:
    return ".".join(filter(None, parts))
