"""Virtual tokens: trained vectors that enter a model's core as if they were words, and leave again.

The core is the innermost module that takes `input_ids` and runs the whole layer stack. Before it
runs, n placeholders (negative ids) are put among the ids of each row, after its left padding; masks
and the like grow with them, positions behind them move on by n. The word embedding gives the
placeholders their trained vectors. Behind the core the outputs are cut back, so that every head
sees the length that it was given. While a cache holds earlier tokens nothing enters: the mask is
widened by the n tokens that are in the cache, and positions move on.

What happened in a call is noted on the call's own tensors, never on a module, so threads, gradient
checkpointing and compilation need nothing special.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.delta import Delta, slot_of
from lightning_peft.errors import AdapterError
from lightning_peft.ops.places import Place, behind_padding
from lightning_peft.ops.states import append, append_states, token_dim

Layout = Literal["clean", "peft"]
Among = Literal["words", "patches", "states"]

CACHES = ("past_key_values", "cache_params", "state", "cache", "mems", "past_buckets_states")
"""The names under which cores of transformers take what earlier calls left."""

POSITIONS = ("position_ids", "cache_position")
"""The names of arguments that say where in the text a token stands."""

_TEXT = ("input_ids", "inputs_embeds")
_UNCUT = (*CACHES, "pooler_output")
_ELSEWHERE = ("encoder_", "decoder_", "cross_", "image_", "vision_", "visual_embeds", "pixel_")
"""Prefixes of arguments that belong to another sequence than the text."""

ENCODER_MASKS = ("encoder_attention_mask", "encoder_padding_mask")
"""The names under which decoders take the mask over the encoder's states."""

_PLACE, _IDS = "_virtual_place", "_virtual_ids"
"""Under these names a call's own tensors carry where tokens entered, and the ids with them."""


class Virtual(Delta, ABC):
    """On the word embedding: gives the placeholders among the ids their trained vectors.

    Where there are no ids it puts the vectors behind the others: on the embeddings of an image
    behind the patches, on an `nn.TransformerEncoder` behind the states, for as long as it runs.

    Args:
        tokens: how many virtual tokens there are.
        among: what the host gives or takes.
    """

    scalable = False

    def __init__(self, tokens: int, among: Among = "words") -> None:
        super().__init__()
        self.tokens, self.among = tokens, among
        # Several adapters may put tokens into one text: each needs ids of its own. They fit 32 bits
        # and are negative, so no comparison with a real id, nor a search for the largest, hits one.
        self.first = -random.SystemRandom().randrange(1, 2**30)

    @property
    def ids(self) -> list[int]:
        """The ids that stand for the virtual tokens, in order."""
        return [self.first - i for i in range(self.tokens)]

    @abstractmethod
    def vectors(self) -> Tensor:
        """Return what the word embedding would give for the virtual tokens, `(tokens, d_model)`."""

    def before(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Replace the placeholders by an id that the table has."""
        if self.among == "states":
            return (), append_states(host, args, kwargs, self.vectors())
        if self.among == "patches":
            return args, kwargs
        (name, ids), *rest = kwargs.items() if not args else [("", args[0])]
        if ids.numel() < self.tokens:  # they enter all or none, so none did
            return args, kwargs
        known = torch.where(self._are_mine(ids), 0, ids)
        setattr(known, _IDS, (*getattr(ids, _IDS, ()), (self, ids)))
        return (known, *args[1:]), dict(rest) if name else kwargs

    def forward(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Put the vectors where the placeholders were, `(batch, tokens, d_model)`."""
        if self.among == "states":
            dim = token_dim(host, output)
            return output.narrow(dim, 0, output.shape[dim] - self.tokens)
        if self.among == "patches":
            return self._appended(output)
        for delta, ids in getattr(args[0], _IDS, ()) if args else ():
            if delta is self:
                return self._replaced(ids, output)
        return output

    def _replaced(self, ids: Tensor, output: Any) -> Any:
        if isinstance(output, tuple):  # a quantised table gives a scale beside the vectors
            return (self._replaced(ids, output[0]), *output[1:])
        which = (self.first - ids).clamp(0, self.tokens - 1)
        vectors = F.embedding(which, self.vectors().to(output.dtype))
        return torch.where(self._are_mine(ids).unsqueeze(-1), vectors, output)

    def _appended(self, output: Any) -> Any:
        if isinstance(output, tuple):  # some give the size of the grid beside the patches
            return (self._appended(output[0]), *output[1:])
        return append(output, self.vectors(), 1)

    def _are_mine(self, ids: Tensor) -> Tensor:
        return (ids <= self.first) & (ids > self.first - self.tokens)


class Enter(Delta):
    """On the core: lets the tokens enter before it and leave behind it; it trains nothing itself.

    Args:
        names: the names of the core's arguments, in order.
        table: the name of the word embedding in the core.
        ids: what enters: ids that stand for virtual tokens, real ones among them.
        skip: how many real tokens stay ahead of them: 1 in encoders, whose heads read the first.
        leave: whether they leave at the core's output; a decoder attends to them otherwise.
        first: whether what was computed for the first of them stands for the first real token.
        room: how many positions the core's table has, if it has one.
        causal: whether each token of the core sees only those before it.
    """

    scalable = False

    def __init__(
        self,
        names: Sequence[str],
        table: str,
        ids: Sequence[int],
        skip: int = 0,
        leave: bool = True,
        first: bool = False,
        room: int | None = None,
        causal: bool = True,
    ) -> None:
        super().__init__()
        self.names, self.table, self.ids = tuple(names), table, tuple(ids)
        self.skip, self.leave, self.first, self.room = skip, leave, first, room
        self.causal = causal

    def before(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Put the tokens into the text, or make room for those that the cache holds."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        key = _text(given)
        if key is None:
            return args, kwargs
        mask = given.get("attention_mask")
        place = Place(_start(mask, self.skip), len(self.ids))
        past, capacity = _past(given)
        if past:
            _check_continued(given, key, past, self._not_yet_counted(host))
            if capacity > 0 and not torch.compiler.is_compiling():
                self._check_room(int(past) - place.size + given[key].shape[1], capacity)
            changes = {k: v + place.size for k, v in _positions(given)}
        else:
            self._check_room(given[key].shape[1], capacity)
            changes = self._entered(host, given, key, place)
        if mask is not None:
            changes["attention_mask"] = _widened(mask, place, past or None, capacity, self.causal)
        return args[len(self.names) :], given | changes

    def forward(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Return the output without what belongs to the tokens."""
        key = _text(kwargs)
        if key is None or not self.leave:
            return output
        rows, length = kwargs[key].shape[:2]
        for delta, place in getattr(kwargs[key], _PLACE, ()):
            if delta is self:
                # An image may stand ahead of the text.
                extra = max(output[0].shape[1] - length, 0) if output[0].dim() == 3 else 0
                moved = Place(place.start + extra, place.size)
                return _left(output, _Leaving(moved, rows, length + extra, self.first))
            length -= place.size  # it has left already
        return output

    def _entered(
        self, host: nn.Module, given: dict[str, Any], key: str, place: Place
    ) -> dict[str, Any]:
        x: Tensor = given[key]
        length = x.shape[1] + place.size
        ids = torch.tensor(self.ids, device=x.device)
        if key == "input_ids":
            longer = place.open(x.long(), place.spread(ids, length))
        else:
            rows = host.get_submodule(self.table)(ids)
            rows = (rows[0] if isinstance(rows, tuple) else rows).to(x.dtype)
            longer = place.open(x, place.spread(rows, length))
        setattr(longer, _PLACE, (*getattr(x, _PLACE, ()), (self, place)))
        changes = {k: place.open(v, _filling(k, v, place)) for k, v in _alike(given, x)}
        return changes | {k: place.open_positions(v) for k, v in _positions(given)} | {key: longer}

    def _check_room(self, length: int, capacity: int) -> None:
        n = len(self.ids)
        if self.room is not None and length + n > self.room:
            raise AdapterError(
                f"The text has {length} tokens, with {n} virtual ones {length + n}, but the "
                f"model has {self.room} learned positions: cut the text at {self.room - n} tokens."
            )
        if 0 < capacity < length + n:
            raise AdapterError(
                f"The static cache holds {capacity} tokens, but the text has {length} and {n} "
                f"virtual ones come with it: build the cache with `max_cache_len` {n} larger, or "
                "use a dynamic one."
            )

    def _not_yet_counted(self, host: nn.Module) -> int:
        """Return how many tokens the cache holds that the mask does not cover yet."""
        deltas = slot_of(host).beside(self)  # those before this one have widened the mask
        entering = [d for d in deltas[deltas.index(self) :] if isinstance(d, Enter)]
        return sum(len(delta.ids) for delta in entering)


class Leave(Delta):
    """On the core of an image model: cuts off the tokens, which stand behind the patches."""

    scalable = False

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Return the output without what belongs to the tokens."""
        rows, length = output[0].shape[:2]
        place = Place(length - self.tokens, self.tokens)
        return _left(output, _Leaving(place, rows, length, False))


class Attended(Delta):
    """On a decoder: widens the mask over the encoder's states by the tokens among them."""

    scalable = False

    def __init__(self, names: Sequence[str], tokens: int) -> None:
        super().__init__()
        self.names, self.tokens = tuple(names), tokens

    def before(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Widen the mask where the encoder's states are longer than it."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        states = given.get("encoder_hidden_states")
        key = next((k for k in ENCODER_MASKS if given.get(k) is not None), "")
        if states is None or not key or states.shape[1] < given[key].shape[-1] + self.tokens:
            return args, kwargs
        place = Place(_start(given[key], 0), self.tokens)
        return args[len(self.names) :], given | {key: place.open_keys(given[key])}


class Placeless(Delta):
    """On a module that reads ids for another purpose: the placeholders count as id 0 there."""

    scalable = False

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)

    def before(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Replace negative ids."""
        at = self.names.index("input_ids") if "input_ids" in self.names else 0
        if at < len(args):
            return (*args[:at], _known(args[at]), *args[at + 1 :]), kwargs
        name = self.names[at]
        return args, kwargs | {name: _known(kwargs[name])} if name in kwargs else kwargs


def _known(ids: Any) -> Any:
    return ids.clamp(min=0) if isinstance(ids, Tensor) else ids


def _text(given: Mapping[str, Any]) -> str | None:
    return next((name for name in _TEXT if given.get(name) is not None), None)


def _positions(given: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    return [(name, given[name]) for name in POSITIONS if given.get(name) is not None]


def _start(mask: Any, skip: int) -> Tensor | int:
    if isinstance(mask, dict):
        mask = next((m for m in mask.values() if m is not None), None)
    if mask is not None and not isinstance(mask, Tensor):
        raise AdapterError(
            f"`attention_mask` must be a tensor, but is {type(mask).__name__} instead: pass the "
            "two-dimensional mask."
        )
    return behind_padding(mask, skip)


def _past(given: Mapping[str, Any]) -> tuple[Any, int]:
    """Return the number of tokens that a cache holds (or whether there are any), and its size."""
    cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
    if cache is None:
        return 0, -1
    if not hasattr(cache, "get_seq_length"):  # the states of a recurrent model
        return bool(cache), -1
    try:
        length = cache.get_seq_length()
    except ValueError:  # all layers are recurrent and count no tokens
        return cache.has_previous_state(), -1
    static = getattr(cache, "is_compileable", False)
    return length, cache.get_max_length() if static else -1


def _check_continued(given: Mapping[str, Any], key: str, past: Any, n: int) -> None:
    """Refuse a call that takes the tokens in the cache for text.

    Raises:
        AdapterError: the mask, or without padding the positions, do not fit the cache.
    """
    if not isinstance(past, int) or torch.compiler.is_compiling():
        return
    end, mask = past - n + given[key].shape[1], given.get("attention_mask")
    positions = [v for _, v in _positions(given) if v.dim() == 2]
    if isinstance(mask, Tensor) and mask.dim() == 2:
        fits = mask.shape[1] == end
    else:
        fits = mask is not None or not positions or int(positions[0].max()) == end - 1
    if not fits:
        raise AdapterError(
            f"The cache holds {past - n} tokens of the text and {n} virtual ones, which the mask "
            "and the positions must not count, but they do not end with the new tokens: to go on "
            "from a cache, pass the new tokens only, with the mask of the whole text."
        )


def _alike(given: Mapping[str, Any], x: Tensor) -> list[tuple[str, Tensor]]:
    """Return the arguments that have one entry for each token of the text `x`."""
    others = {
        k: v
        for k, v in given.items()
        if isinstance(v, Tensor) and k not in (*_TEXT, *POSITIONS, "attention_mask")
    }
    return [
        (name, value)
        for name, value in others.items()
        if value.shape[:2] == x.shape[:2] and not name.startswith(_ELSEWHERE)
    ]


def _filling(name: str, value: Tensor, place: Place) -> Any:
    """Return what stands for the tokens in such an argument: classes are the next token's."""
    if name == "labels":
        return -100
    classes = not value.is_floating_point() and value.dtype != torch.bool
    return place.at_start(value) if classes else 0


def _widened(mask: Any, place: Place, past: Any, capacity: int, causal: bool) -> Any:
    """Return the mask, or the masks by the kind of layer, over the text and the tokens.

    Raises:
        AdapterError: it is a mask for a sliding window, from which the text cannot be told.
    """
    if isinstance(mask, dict):
        if any(m is not None for name, m in mask.items() if name != "full_attention"):
            raise AdapterError(
                "A prepared mask for a sliding window cannot be widened by virtual tokens: use a "
                "dynamic cache, or pass the two-dimensional `attention_mask`."
            )
        return {name: _widened(m, place, past, capacity, causal) for name, m in mask.items()}
    return None if mask is None else place.open_mask(mask, past, capacity, causal)


class _Leaving(NamedTuple):
    place: Place
    rows: int
    length: int
    first: bool


def _left(value: Any, leaving: _Leaving) -> Any:
    """Return what a core gave, without the tokens; tensors are told by their shapes."""
    if isinstance(value, Tensor):
        return _cut(value, leaving)
    if isinstance(value, dict):
        kept = {k: _left_as(k, v, leaving) for k, v in value.items()}
        return kept if type(value) is dict else type(value)(**kept)
    if type(value) in (tuple, list):
        return type(value)(_left(item, leaving) for item in value)
    return value


def _left_as(name: str, value: Any, leaving: _Leaving) -> Any:
    if name == "attention_mask" and isinstance(value, Tensor) and value.dim() == 2:
        return leaving.place.close(value)
    return value if name in _UNCUT else _left(value, leaving)


def _cut(x: Tensor, leaving: _Leaving) -> Tensor:
    place, rows, length, first = leaving
    if x.dim() == 2 and x.shape[0] == rows * length:  # routers flatten rows and tokens
        return place.close(x.view(rows, length, -1)).flatten(0, 1)
    if x.dim() < 3 or x.shape[0] != rows:
        return x
    if x.dim() == 4 and length in x.shape[2:]:  # attention weights: (batch, heads, tokens, keys)
        for dim in [d for d in (2, 3) if x.shape[d] == length]:
            x = place.close(x, dim)
        return x
    if x.dim() == 3 and x.shape[1] > length and not x.shape[1] % length:  # streams, end to end
        streams = x.view(rows, -1, length, x.shape[2])
        return place.close(streams, 2).flatten(1, 2)
    if x.shape[1] != length:
        return x
    short = place.close(x)
    return torch.cat([x[:, :1], short[:, 1:]], 1) if first else short
