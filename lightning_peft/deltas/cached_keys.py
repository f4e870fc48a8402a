"""Learned keys and values that enter through a model's cache, as those of earlier tokens do.

The model then does with them what it does with a text that it has read: positions of the tokens
move on, relative biases and sliding windows count the learned keys. Inside attention
(`learned_keys.py`) none of this happens. In generation they enter once, into the empty cache.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.delta import Delta
from lightning_peft.deltas.learned_keys import FurtherKeys
from lightning_peft.errors import AdapterError
from lightning_peft.structure.probe import Attention

POSITIONS = ("position_ids", "cache_position")


class Caching(NamedTuple):
    """The module that takes the cache, an encoder or a decoder, and what it keeps there."""

    name: str
    """The dotted name of the module."""

    arguments: tuple[str, ...]
    """The names of its arguments."""

    layers: list[Attention]
    """What each layer kept of a few tokens."""

    crossing: bool
    """Whether it is the decoder of an encoder-decoder."""

    room: int | None
    """How many positions its table has, if it has one."""


class CachedKeys(Delta):
    """On what takes the cache, a decoder or an encoder: puts learned keys and values into it.

    Args:
        host: what takes the cache.
        keys: the learned keys and values.
        order: for each layer of the host, which of `keys` it gets.
        parts: modules that `keys` share, whose parameters are kept here.
    """

    scalable = False

    def __init__(
        self,
        host: Caching,
        keys: Sequence[FurtherKeys],
        order: Sequence[int],
        parts: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.names, self.order = tuple(host.arguments), tuple(order)
        self.crossing, self.room = host.crossing, host.room
        self.keys, self.parts = nn.ModuleList(keys), nn.ModuleList(parts)

    def before(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Fill an empty cache; let positions and the mask count what is in it."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        text = next((given[k] for k in ("input_ids", "inputs_embeds") if k in given), None)
        if text is None:
            return args, kwargs
        _refuse_recomputation(host)
        learned = [cast(FurtherKeys, keys).dropped() for keys in self.keys]
        count = learned[0][0].shape[-2]
        cache, mask = given.get("past_key_values"), given.get("attention_mask")
        past = _length(cache)
        self._check(past, text.shape[1], count, mask)
        if not past:
            cache = self._filled(cache, learned, len(text), getattr(host, "dtype", None))
        moved = {k: given[k] + count for k in POSITIONS if given.get(k) is not None}
        moved |= {"past_key_values": cache}
        moved |= {} if mask is None else {"attention_mask": _widened(mask, count)}
        return args[len(self.names) :], given | moved

    def _filled(
        self, cache: Any, learned: Sequence[Any], rows: int, dtype: torch.dtype | None
    ) -> Any:
        cache = empty_cache(self.crossing) if cache is None else cache
        for layer, which in enumerate(self.order):
            pair = [x.to(dtype or x.dtype).expand(rows, -1, -1, -1) for x in learned[which]]
            getattr(cache, "self_attention_cache", cache).update(*pair, layer)
        return cache

    def _check(self, past: int, length: int, count: int, mask: Any) -> None:
        if self.room is not None and max(past, count) + length > self.room:
            raise AdapterError(
                f"The text has {max(past - count, 0) + length} tokens, with {count} learned keys "
                f"before them, but the model has {self.room} learned positions: cut the text at "
                f"{self.room - count} tokens."
            )
        covered = mask.shape[1] if isinstance(mask, Tensor) and mask.dim() == 2 else None
        if past and covered not in (None, past - count + length):
            raise AdapterError(
                f"The cache holds {past - count} tokens of the text behind {count} learned keys, "
                f"and {length} follow, but the mask covers {covered}: pass the mask of the whole "
                "text, without the learned keys."
            )


def order_of(layers: int, crossing: bool) -> list[int]:
    """Return which learned keys each layer gets, as peft has it.

    In a decoder that attends to an encoder peft doubles the list of keys and values and cuts it in
    fours, of which the last two go unused: layer i gets those of layer 2i, counted round.
    """
    return [2 * i % layers if crossing else i for i in range(layers)]


def empty_cache(crossing: bool) -> Any:
    """Return an empty cache, `crossing` for a decoder that attends to an encoder too."""
    from transformers import DynamicCache, EncoderDecoderCache

    return EncoderDecoderCache(DynamicCache(), DynamicCache()) if crossing else DynamicCache()


def _length(cache: Any) -> int:
    if cache is None:
        return 0
    if getattr(cache, "is_compileable", False):
        raise AdapterError(
            "Learned keys in the cache need one that grows, but this one is static: leave out "
            "`cache_implementation`, or train with `layout='clean'`."
        )
    length: int = cache.get_seq_length()
    return length


def _refuse_recomputation(host: nn.Module) -> None:
    if host.training and any(getattr(m, "gradient_checkpointing", False) for m in host.modules()):
        raise AdapterError(
            "Under gradient checkpointing models drop their cache, and the learned keys in it: "
            "switch it off, or train with `layout='clean'`."
        )


def _widened(mask: Any, count: int) -> Any:
    if not isinstance(mask, Tensor):
        raise AdapterError(
            f"`attention_mask` must be a tensor, but is {type(mask).__name__} instead: pass the "
            "two-dimensional mask."
        )
    return F.pad(mask, (count, 0), value=0 if mask.dim() > 2 and mask.is_floating_point() else 1)
