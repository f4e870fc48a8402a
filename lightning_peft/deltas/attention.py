"""How deltas come into attention: three kinds of host, each with its way in.

1. A module of transformers that asks for its attention through `AttentionInterface`. Its forward is
   run with an interface of our own in place of `ALL_ATTENTION_FUNCTIONS`, which hands what it is
   asked for (sdpa, the file's own eager function, flash) through the host's deltas.
2. `nn.MultiheadAttention` (`torch_attention.py`).
3. Any other module that calls scaled dot product attention, or computes product, softmax, product
   (`interception.py`).

Why not a function registered under a name of ours: a forward compares the name in its configuration
(`== "eager"`) and flash kernels read it again, so it must stay. Nothing is registered or changed in
transformers; a bare sibling of the host, compiled or not, runs the code that it ran before.
"""

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from lightning_peft.delta import Attending, through_deltas
from lightning_peft.errors import AdapterError

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"


def route(module: nn.Module) -> type[Attending]:
    """Return the mixin that lets deltas into the attention of `module`."""
    if isinstance(module, nn.MultiheadAttention):
        from lightning_peft.deltas.torch_attention import MultiHead

        return MultiHead
    if uses_interface(type(module)):
        return Interfaced
    from lightning_peft.deltas.interception import Intercepted

    return Intercepted


def uses_interface(cls: type) -> bool:
    """Whether a module of this class asks transformers' `AttentionInterface` for its attention."""
    return next(_asking(cls), None) is not None


class Interfaced(Attending):
    """Mixin of a host whose attention comes from transformers' interface."""

    def __init_subclass__(cls) -> None:
        for name, function in list(_asking(cls)):
            setattr(cls, name, _redirected(function))


class _Interface:
    """What a redirected forward sees as `ALL_ATTENTION_FUNCTIONS`."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def get_interface(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        """Return the attention that transformers would take, passed through the host's deltas."""
        return functools.partial(_attend, self.real.get_interface(name, default), name)


def _attend(
    base: Callable[..., Any],
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    **kwargs: Any,
) -> Any:
    changed = through_deltas(base, module)
    if changed is not base:
        _check(name, attention_mask, kwargs)
    return changed(module, query, key, value, attention_mask, **kwargs)


def _check(name: str | None, mask: Any, kwargs: dict[str, Any]) -> None:
    """Refuse what would let keys that are put in front be dropped unnoticed."""
    if mask is not None and not isinstance(mask, Tensor):
        reason = f"masks of kind {type(mask).__name__}"
    elif name and "flash" in name and kwargs.get("sliding_window"):
        reason = "a sliding window"
    elif name and "flash" in name and kwargs.get("cu_seq_lens_q") is not None:
        reason = "packed sequences"
    elif kwargs.get("cache") is not None:
        reason = "a paged cache"
    else:
        return
    raise AdapterError(
        f"Learned keys and values cannot enter `{name}` attention with {reason}: load the model "
        'with attn_implementation="sdpa".'
    )


def _asking(cls: type) -> Iterator[tuple[str, types.FunctionType]]:
    """Yield the methods, not redirected yet, that ask the interface for an attention function."""
    names = {name for c in cls.__mro__ if not _is_torchs(c) for name in vars(c)}
    for name in sorted(names):
        function = inspect.getattr_static(cls, name)
        if isinstance(function, types.FunctionType) and any(map(_asks, _inner(function))):
            yield name, function


def _is_torchs(cls: type) -> bool:
    return cls is object or cls.__module__.startswith("torch.")


def _asks(function: types.FunctionType) -> bool:
    names = function.__code__.co_names
    present = function.__globals__.get(_INTERFACE)
    return {_INTERFACE, "get_interface"} <= {*names} and not isinstance(present, _Interface)


def _inner(function: types.FunctionType) -> list[types.FunctionType]:
    """Return a function and what its decorators wrapped."""
    found = [function]
    for outer in found:  # which grows on the way
        contents = map(_content, outer.__closure__ or ())
        found += [c for c in contents if isinstance(c, types.FunctionType) and c not in found]
    return found


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _redirected(function: types.FunctionType) -> types.FunctionType:
    """Return the function with our interface in place of transformers' own."""
    scope = function.__globals__
    if _asks(function):
        # Without its module's name a scope is read by dynamo as it is, and not as that module's.
        scope = {key: value for key, value in scope.items() if key != "__name__"}
        scope[_INTERFACE] = _Interface(scope[_INTERFACE])
    cells = tuple(map(_redirected_cell, function.__closure__ or ())) or None
    made = types.FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, cells
    )
    made.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(made, function, updated=())
    return made


def _redirected_cell(cell: types.CellType) -> types.CellType:
    content = _content(cell)
    if isinstance(content, types.FunctionType) and any(map(_asks, _inner(content))):
        return types.CellType(_redirected(content))
    return cell
