"""Empty subclasses, made once per class, that put mixins in front of the class of one module.

The module stays an instance of what it was; copies and pickles are too.
"""

import functools
from typing import Any


class _Quiet:
    # A class may count its subclasses, or ask them for settings; it must not meet ours.
    __init_subclass__ = object.__init_subclass__


@functools.cache
def subclass(base: type, *mixins: type) -> type:
    """Return the one subclass of `base` with `mixins` in front; it prints and pickles like it."""
    body = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    body |= {"__reduce_ex__": _reduce, "_made_of": (base, mixins)}
    bases = (*mixins, base) if issubclass(base, _Quiet) else (*mixins, _Quiet, base)
    return type(base.__name__, bases, body)


def superclass(marked: type) -> type:
    """Return the class that `subclass` was given for `marked`."""
    base: type = marked._made_of[0]  # type: ignore[attr-defined]
    return base


def original(marked: type) -> type:
    """Return the class that `marked` was before any of its layers; itself without one."""
    while "_made_of" in vars(marked):
        marked = superclass(marked)
    return marked


def without(marked: type, *mixins: type) -> type:
    """Return the class `marked` without the layer of `mixins` in it."""
    base, found = marked._made_of  # type: ignore[attr-defined]
    return base if found == mixins else subclass(without(base, *mixins), *found)


def mixins_of(marked: type) -> list[tuple[type, ...]]:
    """Return the mixins of each class that `subclass` made on the way to `marked`, last first."""
    layers = []
    while "_made_of" in vars(marked):
        marked, mixins = marked._made_of  # type: ignore[attr-defined]
        layers.append(mixins)
    return layers


def _rebuild(base: type, *layers: tuple[type, ...]) -> Any:
    for mixins in layers:
        base = subclass(base, *mixins)
    marked: Any = base
    return marked.__new__(marked)


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    layers = mixins_of(type(self))  # a host may have been marked more than once
    return _rebuild, (original(type(self)), *reversed(layers)), self.__getstate__()
