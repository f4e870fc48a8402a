"""What modules do of their own: change buffers in training, run layers past autograd or hooks."""

import functools
import re
from typing import Any, cast

import torch
from torch import nn

from lightning_peft.structure.anatomy import code_of, layers, source_of

_NORM = nn.modules.batchnorm._NormBase
_WRITTEN = re.compile(r"\bself\.(\w+)(?:\s*[-+*/]?=[^=]|\.\w+_\()")
_BY_NAME = re.compile(r"(?<![.\w])(?!self\b)[a-z_]\w*\.forward\(")
"""A call like `layer.forward(...)`, but not of `super()` or of an attribute."""


def drifts(module: nn.Module) -> bool:
    """Whether the module keeps statistics of what it sees in training.

    Norms with running statistics do, and modules whose code writes into their own buffers and asks
    whether it trains (the ranges of quantised activations).
    """
    if isinstance(module, _NORM):
        return cast(Any, module).track_running_stats
    if not module._buffers or type(module).__module__.startswith("torch."):
        return False
    return not _written_in_training(cast(type, type(module))).isdisjoint(module._buffers)


@functools.cache
def _written_in_training(cls: type) -> frozenset[str]:
    """Return the attributes that those methods of a class write which ask for `self.training`."""
    own = [c for c in cls.__mro__ if not c.__module__.startswith(("torch.", "builtins"))]
    code = [f for c in own for f in map(code_of, vars(c).values()) if f]
    asking = [f for f in code if "training" in f.co_names and f.co_name != "__init__"]
    return frozenset(name for each in asking for name in _WRITTEN.findall(source_of(each)))


def recomputing(model: nn.Module) -> list[nn.Module]:
    """Return the modules that run a layer stack inside an autograd function of their own.

    Such a function gives gradients to the weights inside only where an input asks for one too.
    """
    stacks = {name.rpartition(".")[0].rpartition(".")[0] for name, _ in layers(model)}
    parents = [model.get_submodule(name) for name in sorted(stacks)]
    return [parent for parent in parents if _applies_a_function(cast(type, type(parent)))]


@functools.cache
def calls_forward(cls: type) -> bool:
    """Whether a class calls its children's `forward` by that name, past all of their hooks."""
    code = code_of(getattr(cls, "forward", None))
    return code is not None and bool(_BY_NAME.search(source_of(code)))


@functools.cache
def _applies_a_function(cls: type) -> bool:
    forward = getattr(cls, "forward", None)
    code, scope = code_of(forward), getattr(forward, "__globals__", {})
    named = [scope.get(name) for name in (code.co_names if code else ())]
    return any(isinstance(x, type) and issubclass(x, torch.autograd.Function) for x in named)
