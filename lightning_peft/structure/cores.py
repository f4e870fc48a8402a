"""Where virtual tokens enter a model: its core, told by what its modules take and hold."""

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

from torch import nn

from lightning_peft.delta import Delta, only
from lightning_peft.deltas.virtual_tokens import (
    CACHES,
    Attended,
    Enter,
    Layout,
    Leave,
    Placeless,
    Virtual,
)
from lightning_peft.errors import TargetError
from lightning_peft.marker import original
from lightning_peft.structure import anatomy
from lightning_peft.structure.probe import run, tensors_of, words_of

_POSITIONS = re.compile(
    r"(abs(olute)?_)?(wpe|embed_positions|pos(ition(al)?)?s?_emb(ed(ding)?s?)?(_table)?)"
)
"""What models call their table of learned absolute positions."""


class Candidate(NamedTuple):
    """A module that may be the core, by its dotted name, with the names of its arguments."""

    name: str
    module: nn.Module
    arguments: tuple[str, ...]


def virtual_deltas(
    model: nn.Module,
    make: Callable[[nn.Module], Virtual],
    layout: Layout,
    arrange: Callable[[Sequence[int]], Sequence[int]] = list,
) -> dict[str, Delta]:
    """Return the deltas that let virtual tokens enter and leave, by the names of their hosts.

    Args:
        model: where to look for the core.
        make: makes the tokens for their host: the word embedding, or where there is none what
            embeds an image's patches, or an `nn.TransformerEncoder`.
        layout: "clean", or "peft" to place them as peft does.
        arrange: puts the ids of the tokens in order, real ones among them.

    Raises:
        TargetError: nothing in the model takes a text, or an image as a sequence of patches.
    """
    cores = _innermost(_candidates(model, "input_ids"))
    if not cores:
        return _deltas_without_ids(model, make)
    core, decoder = _split(model, cores)
    table = _table(core)
    virtual = make(core.module.get_submodule(table))
    causal = decoder is None and is_causal(core)
    reads_first = decoder is None and not causal
    enter = Enter(
        core.arguments,
        table,
        arrange(virtual.ids),
        skip=int(reads_first and layout == "clean"),
        leave=decoder is None,
        first=reads_first and layout == "peft" and pools(model),
        room=_room(core, table, len(arrange(virtual.ids))),
        causal=causal,
    )
    found: dict[str, Delta] = {core.name: enter, _join(core.name, table): virtual}
    for name, names in _further_readers(core, table):
        found[_join(core.name, name)] = Placeless(names)
    return found | ({decoder.name: Attended(decoder.arguments, len(enter.ids))} if decoder else {})


def core_of(model: nn.Module) -> tuple[Candidate, Candidate | None]:
    """Return the core, and the decoder that attends to what it gives, if there is one.

    Raises:
        TargetError: nothing in the model takes a text.
    """
    cores = _innermost(_candidates(model, "input_ids"))
    if not cores:
        raise TargetError(f"{type(model).__name__} does not take `input_ids`: it reads no text.")
    return _split(model, cores)


def room_of(core: Candidate, tokens: int) -> int | None:
    """Return how many learned positions a core has; None where they go on for ever.

    Raises:
        TargetError: `tokens` alone take all of them.
    """
    try:
        table = _table(core)
    except TargetError:  # it has several, one a codebook
        return None
    return _room(core, table, tokens)


def is_causal(core: Candidate) -> bool:
    """Whether a token sees only those before it; what neither says so nor caches sees all."""
    if getattr(getattr(core.module, "config", None), "is_decoder", False) is True:
        return True
    said = [m.is_causal for m in core.module.modules() if hasattr(m, "is_causal")]
    return any(said) if said else bool({*CACHES} & {*core.arguments}) and _may_decode(core.module)


def pools(model: nn.Module) -> bool:
    """Whether a model gives something for a text as a whole, and not for each token."""
    try:
        words = words_of(model)
        with only(model):
            long, short = (tensors_of(run(model, ids))[0].shape for ids in (words, words[1:]))
    except (AttributeError, TargetError):  # no model of transformers, or none that reads one text
        return True
    return long == short


def _may_decode(module: nn.Module) -> bool:
    return getattr(getattr(module, "config", None), "is_decoder", True) is not False


def _candidates(model: nn.Module, argument: str) -> list[Candidate]:
    """Return the modules that take `argument` and hold layers of a stack, outermost first."""
    blocks, found = tuple(name for name, _ in anatomy.layers(model)), []
    for name, module in anatomy.base_modules(model):
        names = _arguments(module)
        holds = any(block.startswith(f"{name}." if name else "") for block in blocks)
        if argument in names and holds and not anatomy.under(name, blocks):
            found.append(Candidate(name, module, names))
    return [c for c in found if _has_words(c, model)] or found


def _has_words(candidate: Candidate, model: nn.Module) -> bool:
    """Whether a module owns a table as large as the model's word embedding."""
    given = _given_table(model)
    rows = [table.num_embeddings for _, table in anatomy.embeddings(candidate.module)]
    return getattr(given, "num_embeddings", None) in rows


def _given_table(module: nn.Module) -> Any:
    """Return the word embedding that a model of transformers names itself."""
    try:
        return module.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def _innermost(candidates: Sequence[Candidate]) -> list[Candidate]:
    return [c for c in candidates if not any(_inside(other, c) for other in candidates)]


def _inside(inner: Candidate, outer: Candidate) -> bool:
    return inner.name != outer.name and anatomy.under(
        inner.name, (outer.name,) if outer.name else (inner.name,)
    )


def _split(model: nn.Module, cores: list[Candidate]) -> tuple[Candidate, Candidate | None]:
    """Return the core, and the decoder that attends to what it gives."""
    first, *others = cores
    if len(others) == 1 and "encoder_hidden_states" in others[0].arguments:
        return first, others[0]
    around = [c for c in _candidates(model, "input_ids") if all(_inside(i, c) for i in cores)]
    if others and around:
        return around[-1], None
    outer = [c for c in around if _merges(c)]
    return (outer[0] if outer else first), None


def _merges(candidate: Candidate) -> bool:
    """Whether a module puts images among the words, masks both, and has no head of its own.

    What prepares the masks for the layers must know of the tokens.
    """
    module = candidate.module
    images = any(name.startswith("pixel_values") for name in candidate.arguments)
    headless = getattr(module, "base_model_prefix", "") not in module._modules
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    called = code.co_names if code else ()
    masks = any(name.startswith("create_") and "mask" in name for name in called)
    return images and headless and masks and "inputs_embeds" in candidate.arguments


def _table(core: Candidate) -> str:
    """Return the name of the core's word embedding, within the core."""
    names = {id(module): name for name, module in anatomy.base_modules(core.module)}
    given = _given_table(core.module)
    if id(given) in names and not isinstance(given, nn.ModuleList):
        return names[id(given)]
    tables = anatomy.embeddings(core.module)
    width = getattr(getattr(core.module, "config", None), "hidden_size", None)
    several = isinstance(given, nn.ModuleList)
    for name, table in [] if several else tables[:1]:
        if width in (None, table.embedding_dim):
            return name
    raise TargetError(
        f"{type(core.module).__name__} has no word embedding, one table with a vector for each "
        "id: nothing can stand among its words."
    )


def _further_readers(core: Candidate, table: str) -> list[tuple[str, tuple[str, ...]]]:
    """Return what else looks ids up: tables as large as the vocabulary, layers that take ids."""
    words = getattr(core.module.get_submodule(table), "num_embeddings", None)
    tables = [(n, t) for n, t in anatomy.embeddings(core.module) if n != table and words]
    large = [(n, t) for n, t in tables if t.num_embeddings >= (words or 0) and not _places(n)]
    blocks = [(n, m) for n, m in anatomy.layers(core.module) if "input_ids" in _arguments(m)]
    return [(name, _arguments(module)) for name, module in (*large, *blocks)]


def _places(name: str) -> bool:
    return _POSITIONS.fullmatch(name.rpartition(".")[2]) is not None


def _room(core: Candidate, words: str, tokens: int) -> int | None:
    """Return how many positions a table of learned ones has for a text.

    Raises:
        TargetError: the tokens alone take all of them.
    """
    for name, table in anatomy.embeddings(core.module):
        beside = name.rpartition(".")[0] == words.rpartition(".")[0]  # not that of an image
        if (
            beside and _places(name) and "Sinusoidal" not in type(table).__name__
        ):  # those go on for ever
            if (room := table.num_embeddings - _offset(table)) <= tokens:
                raise TargetError(
                    f"`tokens` must leave places for a text among the {room} learned positions of "
                    f"{type(core.module).__name__}, but they take {tokens}."
                )
            return room
    return None


def _offset(table: nn.Embedding) -> int:
    offset = getattr(table, "offset", None)
    if isinstance(offset, int):
        return offset
    return 0 if table.padding_idx is None else table.padding_idx + 1


def _deltas_without_ids(model: nn.Module, make: Callable[[nn.Module], Virtual]) -> dict[str, Delta]:
    for core in _innermost(_candidates(model, "pixel_values")):
        _require_sequence(core, model)
        for name, child in core.module.named_children():
            if "pixel_values" in _arguments(child):
                virtual = make(child)
                return {_join(core.name, name): virtual, core.name: Leave(virtual.tokens)}
    for name, module in anatomy.base_modules(model):
        if isinstance(module, nn.TransformerEncoder):
            return {name: make(module)}
    raise TargetError(
        f"{type(model).__name__} takes neither `input_ids` nor an image as a sequence of patches "
        "with attention over all of them, and has no `nn.TransformerEncoder`: virtual tokens have "
        "nothing to stand among."
    )


def _require_sequence(core: Candidate, model: nn.Module) -> None:
    blocks = [
        m for n, m in anatomy.layers(model) if anatomy.under(n, (core.name,) if core.name else (n,))
    ]
    shapes = {tuple(tuple(p.shape) for p in block.parameters()) for block in blocks}
    if len(shapes) > 1 or not anatomy.attentions(blocks[0]):
        raise TargetError(
            f"{type(model).__name__} keeps its patches on a grid, which its stages convolve, "
            "merge or cut into windows: virtual tokens have no place there."
        )


def _arguments(module: nn.Module) -> tuple[str, ...]:
    try:
        kind = cast(type[nn.Module], original(type(module)))
        parameters = inspect.signature(kind.forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(p.name for p in parameters if p.kind in plain)[1:]


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
