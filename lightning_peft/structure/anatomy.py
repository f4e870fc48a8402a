"""Where a model keeps its layers, attention, feed-forward, embeddings and head.

Found by structure, not by a list of model names: a layer stack is a container of alike blocks, the
head is what stands behind the pretrained core, and so on. Every function skips what adapters added.
"""

import functools
import inspect
import re
import types
from collections.abc import Iterator
from typing import cast

from torch import nn

from lightning_peft.delta import SLOT

_STACKS = (nn.ModuleList, nn.Sequential)
_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,
)
_UNCALLED = nn.modules.linear.NonDynamicallyQuantizableLinear
_READ = re.compile(
    r"(?<!isinstance\()\bself\.(\w+)\.weight\b"
    r"(?!\s*=[^=]|\.(?:dtype|device|shape|data|size|dim|ndim|numel|requires_grad|_\w+))"
)
"""Code that reads a child's weight for its values."""

_GIVEN = re.compile(r"self\.(\w+)\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)")
"""A call of a child, and what it is given."""

_STATES = "encoder_hidden_states"

_HEAD_NAMES = ("classifier", "score", "head", "fc")
"""The field's usual names of a task head, for a model without a layer stack to stand behind."""

Named = tuple[str, nn.Module]


def base_modules(model: nn.Module, prefix: str = "") -> list[Named]:
    """Return every module once with its dotted name, the adapters' own left out."""
    return [(n, m) for n, m in model.named_modules(prefix=prefix) if SLOT not in n.split(".")]


def layers(model: nn.Module) -> list[Named]:
    """Return the blocks of the model's layer stacks in order, encoder before decoder.

    A stack is a `ModuleList` of composite blocks, or a `Sequential` of at least two blocks of one
    class. Where some stacks hold attention the others (convolutional stems) do not count, and a
    stack of stages (Swin) is opened to the blocks inside.
    """
    if not any(child._modules for child in model.children()):
        return []
    found = list(_outermost_stacks("", model))
    attentive = [stack for stack in found if any(_has_attention(block) for _, block in stack)]
    return [block for stack in attentive or found for block in stack]


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a Linear layer, or transformers' `Conv1D`, its transposed sibling."""
    called = isinstance(module, nn.Linear) and not isinstance(module, _UNCALLED)
    return called or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is transformers' `Conv1D`, whose weight has shape `(in, out)`."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_uncalled(module: nn.Module) -> bool:
    """Whether the parent reads this module's weight without calling it."""
    return isinstance(module, _UNCALLED)


def read_weights(module: nn.Module) -> list[str]:
    """Return the names of the weights that are read as tensors instead of calling a layer.

    Those of `nn.MultiheadAttention` and of its output projection, those of fused experts, of shape
    `(experts, ., .)`: a module that says it holds experts, and that of a linear layer which does
    with it what it likes (a router that returns several tensors).
    """
    if not module._parameters or type(module) is nn.Linear:
        return []
    if is_uncalled(module) or _is_own_linear(module):
        return ["weight"]
    named = [(n, p) for n, p in module._parameters.items() if p is not None and p.dim() > 1]
    if isinstance(module, nn.MultiheadAttention):
        return [name for name, _ in named if name.endswith("proj_weight")]
    speaks = "expert" in type(module).__name__.lower()
    return [name for name, weight in named if speaks and weight.dim() == 3]


def read_by_parents(model: nn.Module) -> set[str]:
    """Return the names of linear layers whose weight the parent's code reads as a tensor.

    Instead of calling the layer, or beside it: state-space mixers hand weights to a fused kernel.
    What acts on the weight as it is read acts either way.
    """
    return {
        f"{name}.{child}".lstrip(".")
        for name, parent in base_modules(model)
        for child in _children_read(cast(type, type(parent)))
        if _is_plain_linear(parent._modules.get(child))
    }


@functools.cache
def _children_read(cls: type) -> frozenset[str]:
    """Return the attributes of which the code of a class reads `weight`, by its source."""
    own = [c for c in cls.__mro__ if not c.__module__.startswith(("torch.nn.", "builtins"))]
    code = [f for c in own for f in map(code_of, vars(c).values()) if f and "weight" in f.co_names]
    running = [f for f in code if "init" not in f.co_name and "tie" not in f.co_name]
    return frozenset(name for each in running for name in _READ.findall(source_of(each)))


def code_of(value: object) -> types.CodeType | None:
    """Return the code of a function, that under its decorators."""
    function = inspect.unwrap(value) if inspect.isfunction(value) else value
    return getattr(function, "__code__", None)


def source_of(code: types.CodeType) -> str:
    """Return the text that code was compiled from, where there is one."""
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):  # a class typed into an interpreter
        return ""


def _is_plain_linear(module: nn.Module | None) -> bool:
    linear = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return linear and module.weight.is_floating_point()  # type: ignore[union-attr,operator]


def _is_own_linear(module: nn.Module) -> bool:
    """Whether this is a linear layer with a forward pass of its own, over plain weights."""
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.dim() != 2 or not weight.is_floating_point():
        return False
    if isinstance(module, nn.Linear):
        return type(module).forward is not nn.Linear.forward
    return not module._modules and hasattr(module, "in_features")


def is_attention(module: nn.Module) -> bool:
    """Whether the module is an attention block: it says so, and it owns projections."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    projects = any(is_linear(child) for _, child in base_modules(module))
    return _named_attention(module) and projects and not _is_attentive_layer(module)


def _named_attention(module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower()


def _is_attentive_layer(module: nn.Module) -> bool:
    """Whether this is a whole layer that is only named after the attention inside (Jamba)."""
    inside = [m for m in module.children() if _named_attention(m)]
    beside = [m for m in module.children() if not _named_attention(m)]
    return 0 < _weight_count(inside) < _weight_count(beside)


def attentions(model: nn.Module) -> list[Named]:
    """Return the outermost attention module of each attention sub-layer."""
    found: list[Named] = []
    for name, module in base_modules(model):
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if is_attention(module) and not inside:
            found.append((name, module))
    return found


def feed_forwards(model: nn.Module) -> list[Named]:
    """Return the linear layers inside the layer stack that belong to no attention module."""
    inside = tuple(f"{name}." for name, _ in attentions(model))
    return [(name, module) for name, module in _linears(model) if not name.startswith(inside)]


def uncrossed(model: nn.Module) -> tuple[str, ...]:
    """Return the names of attention to an encoder, in a model that has no encoder to attend to.

    The decoder of an encoder-decoder keeps it when it stands alone (BartForCausalLM), and takes
    states to attend to as an input that is rarely given; without them it does not run.
    """
    name, outer = next(((n, m) for n, m in base_modules(model) if is_transformers(m)), ("", model))
    if _STATES not in inspect.signature(outer.forward).parameters:
        return ()
    if not all(under(n, (name,)) for n, _ in layers(model) if name):
        return ()  # another part of the model may be the encoder
    modules = base_modules(outer, name)
    inside = [(n, m, {k for k, c in m.named_children() if is_attention(c)}) for n, m in modules]
    return tuple(
        _join(n, child)
        for n, parent, attention in inside
        for child in sorted(attention & _given_states(cast(type, type(parent))))
        if len(attention) > 1  # beside that to its own tokens
    )


@functools.cache
def _given_states(cls: type) -> frozenset[str]:
    """Return the attributes that the code of a class calls with an encoder's states."""
    code = code_of(inspect.getattr_static(cls, "forward", None))
    calls = _GIVEN.findall(source_of(code)) if code else []
    return frozenset(name for name, given in calls if _STATES in given)


def embeddings(model: nn.Module) -> list[tuple[str, nn.Embedding]]:
    """Return the embedding tables."""
    return [(n, m) for n, m in base_modules(model) if isinstance(m, nn.Embedding)]


def vocabulary(model: nn.Module) -> int | None:
    """Return the number of rows of the word embedding.

    It is what a model of transformers says it is, of any other the first table that is registered.
    """
    tables = [table for _, table in embeddings(model)]
    for known in [m for _, m in base_modules(model) if is_transformers(m)][:1]:
        try:
            words = known.get_input_embeddings()  # type: ignore[operator]
        except NotImplementedError:  # no words, or in several parts of the model
            continue
        tables = [words, *tables] if isinstance(words, nn.Embedding) else tables
    return tables[0].num_embeddings if tables else None


def speaks(module: nn.Module, vocabulary: int | None) -> bool:
    """Whether a linear layer in `module` projects onto the `vocabulary`, and is thus pretrained."""
    linear = [m for _, m in base_modules(module) if isinstance(m, nn.Linear)]
    return any(m.weight.shape[0] == vocabulary for m in linear)


def projections(model: nn.Module) -> list[Named]:
    """Return what a low-rank method adapts by default.

    The linear layers of the layer stack, also those that are read as tensors; without any its
    convolutions; without a stack all linear and convolutional layers but the head's.
    """
    stack = layers(model)
    out = (*(name for name, _ in head(model)), *(uncrossed(model) if stack else ()))
    within = [named for n, block in stack or [("", model)] for named in base_modules(block, n)]
    inside = [(n, m) for n, m in within if not under(n, out)]
    linear = [(n, m) for n, m in inside if stack and (is_linear(m) or read_weights(m))]
    return linear or [(n, m) for n, m in inside if is_linear(m) or is_dense_convolution(m)]


def is_dense_convolution(module: nn.Module) -> bool:
    """Whether the module is a convolution over 1 or 2 dimensions that mixes all its channels."""
    return isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == 1


def head(model: nn.Module) -> list[Named]:
    """Return the task's head: fresh modules behind the pretrained core.

    What stands beside the core on the way from the root to it and is made of linear and
    normalisation layers only. A projection onto the vocabulary is pretrained, hence no head; so is
    a normalisation alone behind a bare layer stack.
    """
    if not (core := _core(model)):
        named = [(n, m) for n, m in model.named_children() if n in _HEAD_NAMES and _is_dense(m)]
        return named[-1:]
    found: list[Named] = []
    for name, parent, child in _path(model, core):
        children = list(parent.named_children())
        start = [module for _, module in children].index(child) + 1
        fresh = is_transformers(child)
        behind = [(key, m) for key, m in children[0 if fresh else start :] if m is not child]
        found += [(f"{name}{k}", m) for k, m in behind if _is_dense(m, norm_alone=fresh)]
    return [(name, m) for name, m in found if not speaks(m, vocabulary(model))]


def head_parameters(model: nn.Module) -> list[str]:
    """Return the names of the head's parameters, and of what a loader says it found fresh."""
    own_parameters = [(n, p) for n, p in model.named_parameters() if f".{SLOT}." not in f".{n}"]
    names = {id(p): name for name, p in own_parameters}  # a tied one has its first name
    inside = [p for _, module in head(model) for p in module.parameters()]
    own = [names[id(p)] for p in inside if id(p) in names]
    return [*getattr(model, "fresh_parameters", ()), *own]


def _outermost_stacks(prefix: str, module: nn.Module) -> Iterator[list[Named]]:
    for key, child in module.named_children():
        if _is_stack(child):
            yield from _opened([(f"{prefix}{key}.{k}", m) for k, m in child.named_children()])
        elif key != SLOT:
            yield from _outermost_stacks(f"{prefix}{key}.", child)


def _opened(blocks: list[Named]) -> list[list[Named]]:
    """Return the stacks of alike blocks inside stages, or `blocks` as one stack.

    A layer of a transformer may own a stack of experts; a stage owns all its attention, or where
    there is none most of its weights, inside one stack of alike blocks.
    """
    if all(isinstance(block, nn.ModuleList) for _, block in blocks):  # stages that nobody calls
        blocks = [(f"{n}.{k}", m) for n, block in blocks for k, m in block.named_children()]
    inner = [stack for _, block in blocks for stack in _uniform_stacks(block)]
    outer, nested = [b for _, b in blocks], [block for stack in inner for block in stack]
    count = _attention_count if any(map(_has_attention, outer)) else _weight_count
    if not nested or count(nested) <= 0.5 * count(outer):
        return [blocks]
    names = {id(m): f"{n}.{k}" for n, block in blocks for k, m in block.named_modules()}
    return [[(names[id(m)], m) for m in stack] for stack in inner]


def _uniform_stacks(block: nn.Module) -> list[list[nn.Module]]:
    stacks = [list(m.children()) for _, m in base_modules(block) if m is not block and _is_stack(m)]
    uniform = [stack for stack in stacks if len({type(m) for m in stack}) == 1]
    return [stack for stack in uniform if not _is_nested(stack[0], uniform)]


def _is_nested(module: nn.Module, stacks: list[list[nn.Module]]) -> bool:
    tops = [top for stack in stacks for top in stack if top is not module]
    return any(module is m for top in tops for m in top.modules())


def _is_stack(module: nn.Module) -> bool:
    children = list(module.children())
    composite = bool(children) and all(list(c.children()) and _weight_count([c]) for c in children)
    if isinstance(module, nn.Sequential):
        return composite and len(children) > 1 and len({type(c) for c in children}) == 1
    return isinstance(module, nn.ModuleList) and composite


def _has_attention(module: nn.Module) -> bool:
    return any(is_attention(m) for _, m in base_modules(module))


def _attention_count(blocks: list[nn.Module]) -> int:
    return sum(len(attentions(block)) for block in blocks)


def _weight_count(blocks: list[nn.Module]) -> int:
    return sum(p.numel() for block in blocks for p in block.parameters())


def _linears(model: nn.Module) -> list[Named]:
    return [
        (name, module)
        for prefix, block in layers(model)
        for name, module in base_modules(block, prefix)
        if is_linear(module)
    ]


def _path(model: nn.Module, core: str) -> list[tuple[str, nn.Module, nn.Module]]:
    """Return (prefix, parent, child) from the root down to the pretrained core."""
    path, prefix, parent = [], "", model
    for key in core.split("."):
        child = cast(nn.Module, parent._modules[key])
        path.append((prefix, parent, child))
        prefix, parent = f"{prefix}{key}.", child
    return path


def _core(model: nn.Module) -> str:
    """Return the name of the headless pretrained model, or of the last layer stack, or nothing."""
    if not (stack := layers(model)):
        return ""
    known = [(name, module) for name, module in base_modules(model) if is_transformers(module)]
    for name, outer in known[:1]:
        inner = getattr(outer, "base_model_prefix", "")
        return _join(name, inner) if inner in outer._modules else name
    return stack[-1][0].rpartition(".")[0]


def is_transformers(module: nn.Module) -> bool:
    """Whether the module is a model of transformers; its package is not imported to tell."""
    return any(c.__name__ == "PreTrainedModel" for c in type(module).__mro__)


def _is_dense(module: nn.Module, norm_alone: bool = False) -> bool:
    """Whether all weights are those of linear and normalisation layers, linear ones among them."""
    owners = [m for _, m in base_modules(module) if list(m.parameters(recurse=False))]
    return any(is_linear(m) or norm_alone for m in owners) and all(
        is_linear(m) or isinstance(m, _NORMS) for m in owners
    )


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def under(name: str, roots: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of `roots` or lies below one."""
    return any(name == root or name.startswith(f"{root}.") for root in roots)
