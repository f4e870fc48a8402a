"""Prefix-tuning and P-tuning v2 in peft's format: keys and values of all layers in one matrix.

`prompt_embeddings`, `(n, layers · 2 · key_heads · d_head)`, has the keys and the values of each
layer one after the other; what a network made is there as it came out. peft puts them into the
cache: `PrefixTuning(layout="peft")` does the same, and files are read as that.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from lightning_peft.delta import attach, detach
from lightning_peft.deltas.cached_keys import CachedKeys, order_of
from lightning_peft.deltas.learned_keys import FurtherKeys, LearnedKeys
from lightning_peft.errors import CheckpointError, TargetError
from lightning_peft.files.peft.settings import Settings
from lightning_peft.files.peft.spelling import (
    Entry,
    Inexpressible,
    Part,
    Spelling,
    State,
    require_shape,
)
from lightning_peft.files.peft.tokens import (
    EMBEDDINGS,
    ROOT,
    SEQ2SEQ,
    acting,
    common,
    deltas_of,
    is_encoder_decoder,
    read_tokens,
    rehearsable,
    rehearsal,
    require_equal,
    short_text,
    task_of,
    with_head,
)
from lightning_peft.method import Method
from lightning_peft.methods.prefix_tuning import PrefixTuning
from lightning_peft.structure.probe import untouched

_NO_CACHE = "peft has no cache for the prefix of an encoder-decoder but for the task SEQ_2_SEQ_LM."
_REMEDY = "train `PrefixTuning(layout='peft')` for what shall go to peft."


class Learned(NamedTuple):
    """The keys and values of one layer: what makes them, and what its tensors are called."""

    keys: FurtherKeys
    prefix: str


class PrefixSpelling(Spelling):
    """`PrefixTuning` with peft's layout; without it only where there is no difference."""

    peft_type: ClassVar[str] = "PREFIX_TUNING"
    kinds: ClassVar[tuple[str, ...]] = ("prefix", "p_tuning_v2")
    base: ClassVar[str] = ROOT

    def config(self, part: Part) -> dict[str, Any]:
        """Return the settings; a network that there was is part of the past."""
        learned = [pair for pair in _by_layer(part) if pair]
        shapes = {tuple(x.shape) for pair in learned for x in pair.keys.learned()}
        if len(shapes) > 1:
            raise Inexpressible(
                f"peft has keys and values of one shape in all layers, here they are {shapes}."
            )
        ((heads, tokens, width),) = shapes
        crossing = any(d.crossing for d in deltas_of(part, CachedKeys).values())
        if crossing and task_of(part.model) != SEQ2SEQ:
            raise Inexpressible(_NO_CACHE)
        parts = 2 if crossing else 1
        return common(part, tokens, heads * width, heads, len(_by_layer(part)), parts) | {
            "encoder_hidden_size": None,
            "prefix_projection": False,
        }

    def check(self, part: Part) -> None:
        """Compare a prefix inside attention with one in the cache, as peft has it."""
        if not deltas_of(part, CachedKeys):
            _require_equal(part, [pair.keys for pair in _by_layer(part) if pair])

    def method(self, settings: Settings, keys: Sequence[str], model: nn.Module) -> Method:
        """Return prefix-tuning with peft's layout; of a network its last output was kept."""
        settings.ignore("encoder_hidden_size", "prefix_projection")
        tokens = read_tokens(settings, model, crossing=(2,))
        if is_encoder_decoder(model) and settings.peek("task_type") != SEQ2SEQ:
            raise CheckpointError(_NO_CACHE)
        return PrefixTuning(tokens=tokens, layout="peft")

    def entries(self, part: Part) -> list[Entry]:
        """Return an entry for each of our tensors, all of which are parts of one of peft's."""
        pairs = _by_layer(part)
        shape = next(pair for pair in pairs if pair).keys.learned()[0].shape

        def write(state: State) -> Tensor:
            made = [_made(part, pair, state) if pair else _nothing(shape) for pair in pairs]
            return torch.cat([flat(x) for pair in made for x in pair], 1)

        if not all(isinstance(pair.keys, LearnedKeys) for pair in pairs if pair):
            return with_head(part, [Entry(EMBEDDINGS, None, write, lambda tensor: tensor)])
        entries = [
            Entry(EMBEDDINGS, f"{pair.prefix}{name}", write, _reader(2 * layer + i, pairs, shape))
            for layer, pair in enumerate(pairs)
            if pair
            for i, name in enumerate(("key", "value"))
        ]
        return with_head(part, entries)


def flat(x: Tensor) -> Tensor:
    """Return keys or values `(heads, n, d)` as rows `(n, heads · d)`."""
    return x.transpose(0, 1).flatten(1)


def _reader(place: int, pairs: Sequence[Any], shape: Sequence[int]) -> Callable[[Tensor], Tensor]:
    heads, tokens, width = shape

    def read(tensor: Tensor) -> Tensor:
        require_shape(EMBEDDINGS, tensor, (tokens, 2 * len(pairs) * heads * width))
        part = tensor.view(tokens, 2 * len(pairs), heads, width)[:, place]
        return part.transpose(0, 1)

    return read


def _by_layer(part: Part) -> list[Learned | None]:
    """Return what each of the layers in peft's matrix gets; None where peft uses nothing of it."""
    cached = deltas_of(part, CachedKeys)
    if not cached:
        own = deltas_of(part, FurtherKeys)
        if not own:
            raise Inexpressible("peft has no gate on a prefix.")
        return [Learned(keys, part.key(host, "")) for host, keys in own.items()]
    ((host, delta),) = cached.items()
    found: list[Learned | None] = [None] * len(delta.order)
    for place, which in zip(order_of(len(found), delta.crossing), delta.order, strict=True):
        found[place] = Learned(delta.keys[which], part.key(host, f"keys.{which}."))
    return found


def _made(part: Part, pair: Learned, state: State) -> tuple[Tensor, Tensor]:
    if isinstance(pair.keys, LearnedKeys):
        return state[f"{pair.prefix}key"], state[f"{pair.prefix}value"]
    with untouched(part.model):
        return pair.keys.learned()


def _nothing(shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    return torch.zeros(tuple(shape)), torch.zeros(tuple(shape))


def _require_equal(part: Part, keys: Sequence[FurtherKeys]) -> None:
    model: Any = part.model
    if not rehearsable(model):
        raise Inexpressible(f"peft moves positions by the prefix, and `layout` is clean: {_REMEDY}")
    text, count = short_text(model), keys[0].learned()[0].shape[1]
    with rehearsal(model):
        with acting(part, True):
            ours = model(**text)
        with acting(part, False), _through_the_cache(model, keys):
            theirs = model(**text)
    why = f"the positions of the text move on by {count} there; {_REMEDY}"
    require_equal(part, ours, theirs, 0, why)


@contextmanager
def _through_the_cache(model: nn.Module, keys: Sequence[FurtherKeys]) -> Iterator[None]:
    tokens = keys[0].learned()[0].shape[1]
    try:
        made = PrefixTuning(tokens=tokens, layout="peft").deltas(model)
    except TargetError as error:
        raise Inexpressible(f"peft puts a prefix into the cache: {error}") from error
    name, delta = next((n, d) for n, d in made.items() if isinstance(d, CachedKeys))
    if len(delta.order) != len(keys) or delta.crossing:
        raise Inexpressible(
            f"peft has a prefix in the self-attention of {len(delta.order)} layers, here are "
            f"{len(keys)} attention modules: {_REMEDY}"
        )
    for cached, own in zip(cast(Any, delta.keys), keys, strict=True):
        cached.start_at(*own.learned())
    host = model.get_submodule(name)
    attach(host, "rehearsal", delta)
    try:
        yield
    finally:
        detach(host, "rehearsal")


SPELLING = PrefixSpelling()
