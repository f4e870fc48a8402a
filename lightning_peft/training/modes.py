"""Train and eval mode in a module whose base is frozen."""

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_peft.delta import Delta
from lightning_peft.marker import subclass, without


class HeldInEval:
    """Mixin of a frozen module with running statistics, which stays in eval mode."""

    def train(self: Any, mode: bool = True) -> Any:
        self.__dict__["_peft_asked"] = mode  # what it would be in, for `release`
        return super().train(False)  # type: ignore[misc]


def hold_in_eval(module: nn.Module) -> nn.Module:
    """Keep a frozen module in eval mode, or its running statistics drift in training."""
    training = module.training
    module.__class__ = subclass(cast(type, type(module)), HeldInEval)
    module.train(training)
    return module


def release(module: nn.Module) -> None:
    """Undo `hold_in_eval`: the module goes into the mode that was last asked for."""
    module.__class__ = without(type(module), HeldInEval)
    module.train(module.__dict__.pop("_peft_asked"))


def ask_for_gradient(module: nn.Module) -> RemovableHandle:
    """Have what `module` receives ask for a gradient in training, although the base is frozen."""
    return module.register_forward_pre_hook(_ask, with_kwargs=True)


def _ask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    if not module.training or not torch.is_grad_enabled():
        return args, kwargs
    return tuple(map(_asking, args)), {name: _asking(x) for name, x in kwargs.items()}


def _asking(x: Any) -> Any:
    leaves = isinstance(x, Tensor) and x.is_floating_point() and not x.requires_grad
    return x.detach().requires_grad_() if leaves else x


def forget_computed(module: nn.Module) -> None:
    """Let a module that keeps in eval mode what it made of its weights make it anew."""
    if type(module).train is nn.Module.train or isinstance(module, HeldInEval):
        return
    modes = [(child, child.training) for child in module.modules()]
    module.train(True)
    for child, training in modes:
        child.training = training


def prepare(module: nn.Module, within: str) -> None:
    """Put deltas into train mode, also in a base that is in eval mode, and let layers recompute.

    A warning of what is in eval mode by design is held back.

    Args:
        module: the LightningModule.
        within: the name of the base in it, where the base keeps the modes that it came with.
    """
    # transformers recomputes a layer only in train mode, and `from_pretrained` returns eval mode.
    # The flag of the layer alone is set: its dropout stays as the user has it.
    for child in module.modules():
        if getattr(child, "gradient_checkpointing", False):
            child.training = True
        if isinstance(child, Delta):
            child.train()
    _hold_back_warning(module, within)


def _hold_back_warning(module: nn.Module, within: str) -> None:
    """Keep Lightning from warning, unless a module is in eval mode that we do not know of."""
    base = set(module.get_submodule(within).modules()) if within else set()
    in_eval = [child for child in module.modules() if not child.training]
    if in_eval and all(isinstance(child, HeldInEval) or child in base for child in in_eval):
        count = rf"Found {len(in_eval)} module\(s\) in eval mode at the start of training"
        warnings.filterwarnings("ignore", count)
