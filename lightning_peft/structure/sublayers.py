"""Where a layer keeps its sub-layers: the branches that are added to the residual stream.

Found by structure, as everything of `anatomy.py`. A sub-layer is an attention block, or what else
in a layer maps the width of the stream back to itself: a feed-forward block, a block of experts, a
Mamba-like mixer, a residual block of convolutions.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lightning_peft.delta import SLOT
from lightning_peft.structure import anatomy
from lightning_peft.structure.anatomy import Named, is_attention, is_conv1d, is_linear

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
_LISTS = (nn.ModuleList, nn.ModuleDict)
_KEYS_VALUES = re.compile(
    r"(w|to_|project_|projection_)?(k|v|kv|qkv|key|value|query_key|query_key_value|keys_values|"
    r"queries_keys_values)(_proj|_b_proj|_lin|_head|_proj_current|_proj_delayed|_global)?"
    r"|c_attn|in_proj"
)
"""The field's names of projections onto keys and values, alone or fused."""

_OUTPUT_NAME = re.compile(r"(o|w_?o|c|(attention_|to_)?out|output|dense|final)(_?(proj|lin))?")
"""The field's names of an output projection, to tell it from a gate of the same shape."""


@dataclass(frozen=True)
class SubLayer:
    """One branch of a layer.

    Attributes:
        layer: the index of its layer in the model's layer stack.
        mixes: whether it lets tokens see each other (attention, a mixer), or is a feed-forward.
        output: what computes its output before the residual sum: a linear layer or convolution,
            or a module as a whole where no single weight does.
        entry: a module whose first input is the branch's input.
        exit: a module whose output is the branch's output; `entry` itself where one is both.
    """

    layer: int
    mixes: bool
    output: Named
    entry: Named
    exit: Named


def sublayers(model: nn.Module) -> list[SubLayer]:
    """Return the sub-layers of all layers, in order; a module that layers share counts once."""
    found: dict[int, SubLayer] = {}
    out = anatomy.uncrossed(model)
    for index, (name, block) in enumerate(anatomy.layers(model)):
        for sublayer in _of_layer(index, name, block):
            if not anatomy.under(sublayer.output[0], out):
                found.setdefault(id(sublayer.output[1]), sublayer)
    return list(found.values())


def attention_outputs(model: nn.Module) -> list[Named]:
    """Return what computes the output of each sub-layer that mixes tokens."""
    return [s.output for s in sublayers(model) if s.mixes]


def feed_forwards(model: nn.Module) -> list[SubLayer]:
    """Return the feed-forward sub-layers; of a layer without any, the sub-layers that it has."""
    found = sublayers(model)
    fed = {s.layer for s in found if not s.mixes}
    return [s for s in found if not s.mixes or s.layer not in fed]


def feed_forward_outputs(model: nn.Module) -> list[Named]:
    """Return what computes the output of each of `feed_forwards`."""
    return [s.output for s in feed_forwards(model)]


def keys_and_values(attention: Named) -> list[Named]:
    """Return what projects onto keys and values inside an attention module.

    One layer that projects onto queries, keys and values together counts. `nn.MultiheadAttention`
    reads its weights itself: it is returned as a whole.
    """
    name, module = attention
    if isinstance(module, nn.MultiheadAttention):
        return [attention]
    return [(n, m) for n, m in _linears(name, module) if _KEYS_VALUES.fullmatch(_leaf(n))]


def last_projections(sublayer: SubLayer, width: int) -> list[Named]:
    """Return what projects a branch's inner activations: one layer, or that of each expert.

    Experts whose weights are fused into one tensor are returned as the module that owns them.
    """
    if is_linear(sublayer.output[1]) or isinstance(sublayer.output[1], CONVOLUTIONS):
        return [sublayer.output]
    return list(_each_expert(*sublayer.output, width))


def fan(module: nn.Module) -> tuple[int, int]:
    """Return the width of what a linear layer or a convolution takes, and of what it gives."""
    host: Any = module
    if is_conv1d(module):
        return host.weight.shape[0], host.weight.shape[1]
    if isinstance(module, CONVOLUTIONS):
        return host.in_channels, host.out_channels
    return host.in_features, host.out_features


def stream_width(block: nn.Module, said: int | None = None) -> int:
    """Return the width of the stream that runs through a layer, or 0 where nothing tells it.

    It is what most linear layers take or give. A norm counts twice, since the hidden width of a
    mixer may be as frequent; norms inside attention count only where there are no others.

    Args:
        block: the layer.
        said: what the model calls its width, which holds for a layer with such a norm: most of a
            layer may lie behind a bottleneck (MobileBERT).
    """
    inside = tuple(name for name, _ in _attentions("", block))
    norms = [(n, _length(m)) for n, m in anatomy.base_modules(block) if is_norm(m)]
    beside = [width for n, width in norms if not anatomy.under(n, inside)]
    if said is not None and said in beside:
        return said
    linear = [fan(m) for _, m in _linears("", block)]
    given = Counter(out for _, out in linear)
    votes = given + Counter(into for into, _ in linear)
    for width in beside or [width for _, width in norms]:
        votes[width] += 2
    ends = {linear[0][0]} & {linear[-1][1]} if linear else set()  # what goes in and comes out
    return max(votes, key=lambda w: (votes[w], given[w], w in ends, w), default=0)


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a normalisation with weights, of torch or of a model's own."""
    simple = not module._modules or "norm" in type(module).__name__.lower()
    vector = getattr(module._parameters.get("weight"), "ndim", 0) == 1
    return simple and vector and not isinstance(module, nn.PReLU)


def _of_layer(index: int, name: str, block: nn.Module) -> list[SubLayer]:
    width = stream_width(block)
    mixers = [_attention(index, named, width) for named in _attentions(name, block)]
    if any(m is block for _, m in _attentions(name, block)):
        return mixers
    branches = _branches(name, block, width)
    recall = [b for b in branches if _remembers(b[1])]
    chains = [_of_chain(index, c) for c in _chains(name, block, width)]
    if not mixers and not recall and len(branches) > 1:
        recall = branches[:1]
    if not chains and len(recall) == len(branches):
        recall = []  # a layer's only sub-layer counts as its feed-forward
    mixers += [replace(_of_branch(index, b, width), mixes=True) for b in recall]
    rest = chains + [_of_branch(index, b, width) for b in branches if b not in recall]
    return [*mixers, *_substantial(rest)] or _whole(index, name, block)


def _attentions(name: str, block: nn.Module) -> list[Named]:
    if is_attention(block) and not any(map(is_linear, block.children())):
        named = [(_join(name, k), child) for k, child in block.named_children() if k != SLOT]
        return [found for n, child in named for found in _attentions(n, child)]
    return [(_join(name, n), m) for n, m in anatomy.attentions(block)]


def _attention(index: int, named: Named, width: int) -> SubLayer:
    output = _output_projection(*named, width) or named
    return SubLayer(index, True, output, named, output)


def _chains(name: str, block: nn.Module, width: int) -> list[list[Named]]:
    """Return the feed-forwards whose layers stand one by one in the block (`fc1`, `fc2`)."""
    chains: list[list[Named]] = []
    chain: list[Named] = []
    for kind, found in _pieces(name, block, width):
        for named in found if kind == "loose" else ():
            chain.append(named)
            if len(chain) > 1 and fan(named[1])[1] == width:
                chains += [chain] if fan(chain[0][1])[0] == width else []
                chain = []
                break  # what else the same module owns comes behind the residual sum
    return chains


def _branches(name: str, block: nn.Module, width: int) -> list[Named]:
    """Return the modules of the block that hold a whole branch each."""
    found = (found for kind, found in _pieces(name, block, width) if kind == "branch")
    narrowed = [_narrowed(*named) for (named,) in found]
    return [(n, m) for n, m in narrowed if m._modules or _has_experts(m)]


def _pieces(name: str, block: nn.Module, width: int) -> Iterator[tuple[str, list[Named]]]:
    """Yield what stands beside the attention: whole branches, and layers one by one."""
    last = 0
    for key, child in block.named_children():
        full, weights = _join(name, key), _linears(_join(name, key), child)
        if key == SLOT or is_attention(child):
            continue
        continues = bool(weights) and fan(weights[0][1])[0] == last != width
        if anatomy.attentions(child) or isinstance(child, _LISTS):
            yield from _pieces(full, child, width)
        elif (len(weights) > 1 or _holds_matrices(child)) and not continues:
            yield "branch", [(full, child)]
        elif weights:
            last = fan(weights[-1][1])[1]
            yield "loose", weights


def _of_chain(index: int, chain: list[Named]) -> SubLayer:
    return SubLayer(index, False, chain[-1], chain[0], chain[-1])


def _of_branch(index: int, branch: Named, width: int) -> SubLayer:
    if _has_experts(branch[1]):
        return SubLayer(index, False, branch, branch, branch)
    output = _output_projection(*branch, width)
    if output is None and not _holds_matrices(branch[1]):
        output = _linears(*branch)[-1]  # of a stage that changes the width
    apart = _has_norm(branch[1]) or isinstance(branch[1], nn.Sequential)  # which carries nothing
    if output is None or not apart:
        return SubLayer(index, False, output or branch, branch, branch)
    linear = [named for named in _linears(*branch) if named != output] or [output]
    entry = next((named for named in linear if fan(named[1])[0] == width), linear[0])
    return SubLayer(index, False, output, entry, output)


def _whole(index: int, name: str, block: nn.Module) -> list[SubLayer]:
    """Return a block of convolutions, or one that nothing is known of, as one sub-layer."""
    convolutions = [
        (n, m) for n, m in anatomy.base_modules(block, name) if isinstance(m, CONVOLUTIONS)
    ]
    dense = [(n, m) for n, m in convolutions if m.groups < max(2, m.out_channels)]
    if dense:
        return [SubLayer(index, False, dense[-1], (name, block), dense[-1])]
    if convolutions or isinstance(block, _LISTS) or not any(True for _ in block.parameters()):
        return []
    return [SubLayer(index, False, (name, block), (name, block), (name, block))]


def _each_expert(name: str, module: nn.Module, width: int) -> Iterator[Named]:
    if anatomy.read_weights(module):
        yield name, module
        return
    for key, child in module.named_children():
        full = _join(name, key)
        if isinstance(child, _LISTS) or _has_experts(child):
            yield from _each_expert(full, child, width)
        elif child._modules and (found := _output_projection(full, child, width)):
            yield found


def _substantial(found: list[SubLayer]) -> list[SubLayer]:
    """Leave out small branches beside the feed-forward, such as gates of norms."""
    sizes = [sum(p.numel() for m in _ends(s) for p in m.parameters()) for s in found]
    return [s for s, size in zip(found, sizes, strict=True) if size >= 0.25 * max(sizes)]


def _ends(sublayer: SubLayer) -> list[nn.Module]:
    return list({id(m): m for _, m in (sublayer.entry, sublayer.exit)}.values())


def _output_projection(name: str, module: nn.Module, width: int) -> Named | None:
    """Return the last linear layer that gives `width`; one of the module's own comes first."""
    if isinstance(module, nn.MultiheadAttention):
        return None
    children = [(_join(name, k), m) for k, m in module.named_children() if k != SLOT]
    own = [(n, m) for n, m in children if is_linear(m) and fan(m)[1] == width]
    named = [(n, m) for n, m in own if _OUTPUT_NAME.fullmatch(n.rpartition(".")[2].lower())]
    deeper = (_output_projection(n, m, width) for n, m in reversed(children))
    return (named or own)[-1] if own else next((found for found in deeper if found), None)


def _narrowed(name: str, module: nn.Module) -> Named:
    """Return the innermost module that holds all that `module` holds but norms."""
    while not module._parameters:
        inside = [(k, m) for k, m in module.named_children() if _linears("", m) or _is_bare(m)]
        if len(inside) != 1 or is_linear(inside[0][1]):
            break
        name, module = _join(name, inside[0][0]), inside[0][1]
    return name, module


def _linears(name: str, module: nn.Module) -> list[Named]:
    return [(n, m) for n, m in anatomy.base_modules(module, name) if is_linear(m)]


def _has_experts(module: nn.Module) -> bool:
    inside = [m for _, m in anatomy.base_modules(module)]
    lists = any(isinstance(m, _LISTS) and any(c._modules for c in m.children()) for m in inside)
    return lists or any(_rank(p) > 2 for m in inside for p in _own(m))


def _holds_matrices(module: nn.Module) -> bool:
    return any(_is_bare(m) for _, m in anatomy.base_modules(module))


def _is_bare(module: nn.Module) -> bool:
    """Whether the module owns matrices although it is no layer of a kind that is known."""
    return any(_rank(p) > 1 for _, m in anatomy.base_modules(module) for p in _own(m))


def _own(module: nn.Module) -> list[nn.Parameter]:
    known = is_linear(module) or isinstance(module, (*CONVOLUTIONS, nn.Conv3d, nn.Embedding))
    return [] if known else [p for p in module._parameters.values() if p is not None]


def _rank(parameter: nn.Parameter) -> int:
    return sum(size > 1 for size in parameter.shape)


def _remembers(module: nn.Module) -> bool:
    """Whether the module mixes tokens without attention: by a convolution, or a state space."""
    inside = [m for _, m in anatomy.base_modules(module)]
    return any(isinstance(m, nn.Conv1d) for m in inside) and not _has_experts(module)


def _has_norm(module: nn.Module) -> bool:
    return any(is_norm(m) for _, m in anatomy.base_modules(module))


def _length(norm: Any) -> int:
    return len(norm.weight)


def _leaf(name: str) -> str:
    return name.removesuffix(".linear").rpartition(".")[2].lower()


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
