"""A delta changes what one module computes; this is the only file that touches a module.

A delta becomes a child of its host under one reserved name, a pair of forward hooks applies it,
and an empty subclass of the host's own class marks it. So every state-dict key of the base stays,
`isinstance` still holds, copies and pickles carry the delta, a compiled graph of an unmarked
sibling is not reused (its guard sees another type), and fast paths that read weights switch off.
"""

import functools
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lightning_peft.errors import AdapterError
from lightning_peft.marker import mixins_of, subclass, without

SLOT = "lightning_peft"
"""The name under which a host module keeps its deltas."""

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_HALF = (torch.float16, torch.bfloat16)


class NotMergeable(AdapterError):
    """The change cannot be written into the host's weights."""


class Unforgivable(str):
    """A key whose absence from a state dict is an error although it belongs to an adapter."""

    __slots__ = ()


class Delta(nn.Module):
    """What a method adds to one module; active from the start.

    Its floating-point tensors never become narrower than they were made: when the model is cast to
    bfloat16 the delta stays a float32 master copy, so that small optimizer steps are not lost.
    """

    active = True
    """Whether it acts; to be changed through its slot."""

    strength: float = 1.0
    """How much of the change is applied: 0 leaves the base as it is, 1 is as trained."""

    scalable: ClassVar[bool] = True
    """Whether there is something between the base and the change."""

    merges_scaled: ClassVar[bool] = True
    """Whether a part of the change of the weight gives that part of the change of the output."""

    additive: bool = False
    """Whether it only adds something to the host's weight, whatever else changes that."""

    merges_shared: ClassVar[bool] = False
    """Whether the method has changed all modules that share the host's weight alike."""

    sums: ClassVar[bool] = False
    """Whether it reweighs a plain linear layer, and that in the layer's own forward pass alone."""

    def before(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Return the inputs of `host`, changed."""
        return args, kwargs

    def forward(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Return the `output` of `host`, changed; `args` and `kwargs` are what it received."""
        return output

    def reweigh(self, host: nn.Module, name: str, weight: Tensor) -> Tensor:
        """Return the host's parameter (or buffer) `name` as its forward pass shall read it.

        The way to a weight that is used without calling a module that owns it alone: fused experts,
        `nn.MultiheadAttention`. The parameter itself stays what it is.
        """
        return weight

    def attend(
        self,
        host: nn.Module,
        base: Callable[..., Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        **kwargs: Any,
    ) -> Any:
        """Return what the attention `base` of `host` gives, changed.

        Args:
            host: the attention module.
            base: its attention, to be called as `base(host, query, key, value, mask, **kwargs)`.
            query: `(batch, heads, tokens, d_head)`.
            key: `(batch, key_heads, keys, d_head)`, the cached ones included.
            value: `(batch, key_heads, keys, d_value)`.
            mask: boolean, additive or None, as `base` takes it.
            kwargs: what else `base` takes, such as `is_causal`, `scaling` and `dropout`.

        Returns:
            What `base` returns: the output, `(batch, tokens, heads, d_value)`, and the weights or
            None. Further keys and values may only stand before the present ones.
        """
        return base(host, query, key, value, mask, **kwargs)

    def chain_of(self, delta: "Delta") -> "Sequence[Delta]":
        """Return what acts on the same rows as `delta`, where this one stands in for several."""
        return ()

    def reset_parameters(self) -> None:
        """Initialise in place (a model built on the meta device calls this on each module)."""

    def merge(self, module: nn.Module) -> None:
        """Fold the change into the weights of the host `module`.

        Raises:
            NotMergeable: no weight of the host can hold the change.
        """
        raise NotMergeable(
            f"`{type(self).__name__}` cannot be merged into {type(module).__name__}."
        )

    def _apply(self, fn: Any, recurse: bool = True) -> "Delta":
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrowed = moved.dtype in _HALF and tensor.dtype not in _HALF
            return tensor.to(moved.device) if narrowed else moved

        return super()._apply(keep_precision, recurse)


class Slot(nn.ModuleDict):
    """The deltas of a host by name; those in `running` act, in this order.

    Hooks read `running` alone. A compiled graph takes the parameters of what stands there as its
    inputs, so that an exchange of one delta for another of its kind compiles nothing anew.
    """

    def __init__(self) -> None:
        super().__init__()
        self.running: list[Delta] = []

    def refresh(self) -> None:
        """Take into `running` what is active, as much of it as is applied."""
        deltas = cast(list[Delta], self._modules.values())
        # Not by `Module.__setattr__`, which costs more than all else in a switch of adapters.
        self.__dict__["running"] = [d if d.strength == 1 else _part(d) for d in deltas if d.active]

    def beside(self, delta: Delta) -> Sequence[Delta]:
        """Return what acts on the same rows as `delta`, which is among it, in order."""
        found = (acting.chain_of(delta) for acting in self.running)
        return next((chain for chain in found if chain), self.running)

    def let_act(self, name: str, active: bool) -> None:
        """Let a delta act, or not."""
        cast(Delta, self._modules[name]).__dict__["active"] = active
        self.refresh()


def _part(delta: Delta) -> Delta:
    from lightning_peft.merging.scaling import Part  # which is a delta itself

    return Part(delta)


def attach(module: nn.Module, name: str, delta: Delta) -> Slot:
    """Let `delta` change what `module` computes, after the deltas that it already carries.

    Returns:
        The deltas of the module.

    Raises:
        AdapterError: the module already carries a delta of that name, or is a plain container.
    """
    slot = slot_of(module) if SLOT in module._modules else _open(module)
    if name in slot:
        raise AdapterError(f"A {type(module).__name__} already carries a delta `{name}`.")
    if type(delta).before is not Delta.before and _before not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_before, with_kwargs=True)
    if type(delta).reweigh is not Delta.reweigh:
        _let_reweigh(module, delta)
    if type(delta).attend is not Delta.attend and not any(map(_attends, mixins_of(type(module)))):
        from lightning_peft.deltas.attention import route  # which knows deltas itself

        module.__class__ = subclass(cast(type, type(module)), cast(type, route(module)))
    slot[name] = delta.train(module.training)
    slot.refresh()
    return slot


def plain_name(name: str) -> str:
    """Return a parameter's name without what compilation and sharding wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def detach(module: nn.Module, name: str) -> None:
    """Take the delta `name` from `module`; with the last one the module is what it was before."""
    slot = slot_of(module)
    del slot[name]
    slot.refresh()
    if not slot:
        _close(module)


def slot_of(module: nn.Module) -> Slot:
    """Return the deltas of a host module by name."""
    return cast(Slot, module._modules[SLOT])


@contextmanager
def only(model: nn.Module, kept: Collection[Delta] = ()) -> Iterator[None]:
    """Within this context no deltas of a model act but those that are `kept`."""
    slots = [slot_of(module) for module in model.modules() if SLOT in module._modules]
    running = [slot.running for slot in slots]
    for slot in slots:
        slot.running = [delta for delta in slot.running if delta in kept]
    try:
        yield
    finally:
        for slot, deltas in zip(slots, running, strict=True):
            slot.running = deltas


class Attending:
    """Mixin of a host whose attention passes through its deltas; `attention.py` has its kinds."""


def through_deltas(base: Callable[..., Any], module: nn.Module) -> Callable[..., Any]:
    """Return the attention `base` of `module` as its deltas change it, the first one outermost."""
    for delta in reversed(slot_of(module).running):
        if type(delta).attend is not Delta.attend:
            base = functools.partial(_attend, delta, base)
    return base


def _attend(
    delta: Delta,
    base: Callable[..., Any],
    host: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    **kwargs: Any,
) -> Any:
    return delta.attend(host, base, query, key, value, attention_mask, **kwargs)


class _Reweighed:
    """Mixin of a host whose parameters and buffers are read through its deltas."""

    def __getattr__(self: Any, name: str) -> Any:
        # They are no attributes of a module: each look-up comes here.
        value = super().__getattr__(name)  # type: ignore[misc]
        if value is None or name in self.__dict__["_modules"]:
            return value
        for delta in self.__dict__["_modules"][SLOT].running:
            value = delta.reweigh(self, name, value)
        return value


class Summing:
    """Mixin of a linear layer that says when its forward pass is the one that reads its weight."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        outer, _READ.host = getattr(_READ, "host", None), self
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            _READ.host = outer


def in_forward(host: nn.Module) -> bool:
    """Whether the forward pass of a layer is what reads its weight; a compiler sees no other."""
    return torch.compiler.is_compiling() or getattr(_READ, "host", None) is host


class _Remembering:
    """Mixin of a host that reads a parameter many times in one pass: it is changed once."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # which sees by itself what is equal
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        outer, _READ.weights = getattr(_READ, "weights", None), {}
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            _READ.weights = outer

    def __getattr__(self: Any, name: str) -> Any:
        weights = None if torch.compiler.is_compiling() else getattr(_READ, "weights", None)
        if weights is None or name not in self.__dict__["_parameters"]:
            return super().__getattr__(name)  # type: ignore[misc]
        key = id(self), name, torch.is_grad_enabled()
        if key not in weights:
            weights[key] = super().__getattr__(name)  # type: ignore[misc]
        return weights[key]


_READING = {_Reweighed, _Remembering, Summing}
_READ = threading.local()
"""What has been read in the forward pass that a thread is in, and by which summing layer."""


def _let_reweigh(module: nn.Module, delta: Delta) -> None:
    linear = isinstance(module, nn.Linear)
    if delta.sums and not isinstance(module, Summing):
        if type(module).forward is not nn.Linear.forward:
            return
        module.__class__ = subclass(cast(type, type(module)), Summing)
    if not isinstance(module, _Reweighed):
        mixins = (_Reweighed,) if linear else (_Remembering, _Reweighed)
        module.__class__ = subclass(cast(type, type(module)), *mixins)


def _attends(mixins: tuple[type, ...]) -> bool:
    return any(issubclass(mixin, Attending) for mixin in mixins)


def _open(module: nn.Module) -> Slot:
    if isinstance(module, CONTAINERS):
        raise AdapterError(
            f"A {type(module).__name__} runs its children one by one and cannot carry a delta: "
            "name one of its children instead."
        )
    module.add_module(SLOT, slot := Slot())
    slot.register_load_state_dict_post_hook(_forgive_missing)
    module.__class__ = subclass(cast(type, type(module)))
    module.register_forward_hook(_after, with_kwargs=True)
    return slot


def _close(module: nn.Module) -> None:
    del module._modules[SLOT]
    for mixins in mixins_of(type(module)):
        if {*mixins} <= _READING or _attends(mixins):  # what `attach` put there
            module.__class__ = without(type(module), *mixins)
    pre, post = module._forward_pre_hooks, module._forward_hooks
    for key in [key for key, hook in pre.items() if hook is _before]:
        del pre[key], module._forward_pre_hooks_with_kwargs[key]
    for key in [key for key, hook in post.items() if hook is _after]:
        del post[key], module._forward_hooks_with_kwargs[key]


def _before(module: nn.Module, args: Any, kwargs: Any) -> Any:
    for delta in module._modules[SLOT].running:  # type: ignore[union-attr]
        args, kwargs = delta.before(module, args, kwargs)
    return args, kwargs


def _after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    for delta in module._modules[SLOT].running:  # type: ignore[union-attr]
        output = delta(module, args, kwargs, output)
    return output


def _forgive_missing(slot: nn.Module, incompatible: Any) -> None:
    # A checkpoint of the bare base must load strictly; that an adapter's own keys are all there or
    # all absent is checked where the whole state dict is in sight (`adapter.py`).
    missing = incompatible.missing_keys
    missing[:] = [k for k in missing if f"{SLOT}." not in k or isinstance(k, Unforgivable)]
