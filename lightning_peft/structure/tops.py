"""Which layers a model runs last, and what stands above them.

Layers are registered in the order in which a forward pass runs them, but for models of several
parts: a text model may register the encoder of its images, which it runs first, last.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator
from typing import Any

from torch import nn

from lightning_peft.delta import SLOT, only
from lightning_peft.errors import TargetError
from lightning_peft.structure.anatomy import (
    Named,
    base_modules,
    is_linear,
    is_transformers,
    layers,
    speaks,
    under,
    vocabulary,
)
from lightning_peft.structure.probe import run


def running_order(model: nn.Module) -> list[Named]:
    """Return the model's layers, those of the stack that runs last at the end.

    Where there are several stacks a few tokens tell, and stacks that text alone does not reach come
    first. What cannot be run on a few tokens keeps the order in which it registers them.
    """
    blocks, last = layers(model), dict[str, int]()
    name, outer = next(((n, m) for n, m in base_modules(model) if is_transformers(m)), ("", None))
    if outer is None or len({_stack(n) for n, _ in blocks}) < 2:
        return blocks
    if not all(under(n, (name,)) for n, _ in blocks if name):
        return blocks
    try:
        with only(outer):
            run(outer, around=lambda: _noted(blocks, last))
    except TargetError:
        return blocks
    return sorted(blocks, key=lambda named: last.get(_stack(named[0]), -1))


def above_layers(model: nn.Module, blocks: list[Named]) -> list[str]:
    """Return the parameters that come after the last of the layers (pooler, final norm, head).

    A projection onto the vocabulary does not count, nor do parts with layers of their own.
    """
    last = f"{blocks[-1][0]}."
    names = [name for name, _ in model.named_parameters() if f".{SLOT}." not in f".{name}"]
    after = names[max(i for i, name in enumerate(names) if name.startswith(last)) + 1 :]
    out = tuple(
        name
        for name, module in base_modules(model)
        if is_linear(module) and speaks(module, vocabulary(model))
    )
    beside = tuple({_fork(name, last) for name, _ in blocks if _stack(name) != _stack(last[:-1])})
    return [name for name in after if not under(name, out + beside)]


@contextlib.contextmanager
def _noted(blocks: list[Named], last: dict[str, int]) -> Iterator[None]:
    count = itertools.count()

    def note(stack: str, *_: Any) -> None:
        last[stack] = next(count)

    last.clear()
    hooks = [
        block.register_forward_pre_hook(functools.partial(note, _stack(name)))
        for name, block in blocks
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _stack(name: str) -> str:
    return name.rpartition(".")[0]


def _fork(name: str, other: str) -> str:
    """Return where a dotted name leaves the way to another one."""
    parts, way = name.split("."), other.split(".")
    pairs = enumerate(zip(parts, way, strict=False))
    at = next((i for i, (one, two) in pairs if one != two), len(parts) - 1)
    return ".".join(parts[: at + 1])
