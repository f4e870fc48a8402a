"""Where a model keeps what earlier tokens left, and its shapes: found by running it once."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_peft.delta import Delta, attach, detach
from lightning_peft.deltas.cached_keys import Caching, empty_cache
from lightning_peft.errors import TargetError
from lightning_peft.structure import anatomy
from lightning_peft.structure.cores import core_of, room_of
from lightning_peft.structure.probe import Attention, pretrained, run, spread

_NAME = "caches"


class _Handing(Delta):
    """Hands its host an empty cache."""

    def __init__(self, names: tuple[str, ...], crossing: bool) -> None:
        super().__init__()
        self.names, self.crossing = names, crossing
        self.cache: Any = None

    def before(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Replace the cache."""
        self.cache = empty_cache(self.crossing)
        given = dict(zip(self.names, args, strict=False)) | kwargs
        return args[len(self.names) :], given | {"past_key_values": self.cache}


def caching(model: nn.Module, tokens: int, ids: Sequence[int] = ()) -> Caching:
    """Return where learned keys and values enter the cache of `model`.

    Args:
        model: a model of transformers; it is left as it was.
        tokens: how many keys there are to be.
        ids: of the tokens to run.

    Raises:
        TargetError: the model takes no cache, or its layers do not read one.
    """
    core, decoder = core_of(model)
    host = decoder or core
    if "past_key_values" not in host.arguments:
        raise TargetError(
            f"{type(host.module).__name__} takes no cache through which learned keys and values "
            "could enter: leave `layout` at 'clean'."
        )
    handing = _Handing(host.arguments, decoder is not None)
    run(_runner(model, host.name), ids, lambda: _attached(host.module, handing))
    cache = handing.cache
    layers = [] if cache is None else getattr(cache, "self_attention_cache", cache).layers
    if not layers or not all(isinstance(getattr(x, "keys", None), Tensor) for x in layers):
        raise TargetError(
            f"The layers of {type(host.module).__name__} do not keep keys and values of each "
            "token in a cache: leave `layout` at 'clean'."
        )
    seen = [_seen(layer) for layer in layers]
    return Caching(host.name, host.arguments, seen, decoder is not None, room_of(host, tokens))


def _runner(model: nn.Module, host: str) -> nn.Module:
    for name, inner in pretrained(model):
        if anatomy.under(host, (name,) if name else (host,)):
            return inner
    raise TargetError(
        f"{type(model).__name__} holds no model of transformers, whose cache could be filled: "
        "leave `layout` at 'clean'."
    )


def _seen(layer: Any) -> Attention:
    key, value = layer.keys[0].detach(), layer.values[0].detach()
    width = key.shape[0] * key.shape[-1]
    return Attention(width, key, value, spread(key), spread(value))


@contextlib.contextmanager
def _attached(host: nn.Module, delta: Delta) -> Iterator[None]:
    attach(host, _NAME, delta)
    try:
        yield
    finally:
        detach(host, _NAME)
