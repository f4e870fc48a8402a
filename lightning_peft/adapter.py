"""The handle on what was injected into a model."""

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lightning_peft.delta import (
    SLOT,
    Delta,
    HeldInEval,
    NotMergeable,
    Unforgivable,
    attach,
    detach,
    hold_in_eval,
    plain_name,
    release,
    slot_of,
)
from lightning_peft.errors import AdapterError, near_misses
from lightning_peft.fingerprint import fingerprint
from lightning_peft.optimizers import parameter_groups
from lightning_peft.scaling import fold, scale_of, set_scale
from lightning_peft.structure.anatomy import is_transformers

if TYPE_CHECKING:
    from lightning_peft.method import Method

_NORM = nn.modules.batchnorm._NormBase


def adapters_of(model: nn.Module) -> dict[str, "Adapter"]:
    """Return the adapters that `model` or a module inside it carries, by name."""
    return {n: a for m in model.modules() for n, a in m.__dict__.get("_adapters", {}).items()}


class Adapter:
    """What one call of `inject` added to a model: its parameters, its state, and the way back.

    Attributes:
        model: the module that was injected.
        name: the adapter's name.
        methods: the methods, in order.
    """

    _disabled = False

    def __init__(
        self,
        model: nn.Module,
        name: str,
        methods: Sequence["Method"],
        deltas: Sequence[tuple[str, str, Delta]],
        in_place: Sequence[str],
    ) -> None:
        self.model, self.name, self.methods = model, name, tuple(methods)
        self._check(in_place)
        self._required = {plain_name(n): p.requires_grad for n, p in model.named_parameters()}
        model.requires_grad_(False)
        self._hosts: list[tuple[str, str]] = []
        self.in_place = sorted({plain_name(name) for name in in_place})
        try:
            for host, key, delta in deltas:
                attach(model.get_submodule(host), key, delta)
                self._hosts.append((plain_name(host), key))
            self._originals = self._set_aside() if in_place else {}
        except BaseException:
            self._unwind()
            raise
        self._held = _hold_frozen_norms(model, self.in_place)
        _registry(model)[name] = self
        _tell_transformers(model)
        self._guard = model.register_load_state_dict_pre_hook(_refuse_partial)

    def __repr__(self) -> str:
        methods = ", ".join(repr(method) for method in self.methods)
        return f"Adapter({self.name!r}, [{methods}], {self.num_parameters:,} parameters)"

    @property
    def deltas(self) -> list[tuple[str, nn.Module, Delta]]:
        """The host's name, the host and the delta, for each delta in the order of attachment."""
        self._require_present()
        modules = _modules(self.model)
        hosts = [(name, key, modules[name]) for name, key in self._hosts]
        return [(name, host, cast(Delta, slot_of(host)[key])) for name, key, host in hosts]

    def deltas_of(self, method: "Method") -> dict[str, Delta]:
        """Return the deltas of one of the adapter's methods by the name of their host."""
        key, modules = f"{self.name}_{method.kind}", _modules(self.model)
        hosts = [host for host, own in self._hosts if own == key]
        return {host: cast(Delta, slot_of(modules[host])[key]) for host in hosts}

    @functools.cached_property
    def base_fingerprint(self) -> dict[str, Any]:
        """The fingerprint of the frozen base, which never changes and is thus taken once."""
        return fingerprint(self.model, set(self.tensors()))

    @functools.cached_property
    def start_epochs(self) -> dict[str, int]:
        """By name, the epoch from which a parameter is trained, where it is not 0."""
        found = [item for m in self.methods for item in m.start_epochs(self.model).items()]
        return {plain_name(name): epoch for name, epoch in found}

    @property
    def scale(self) -> float:
        """How much of the change is applied: 0 none, 1 all; of the running model, never saved.

        What is trained in place beside the methods (a head) stays as trained.
        """
        return scale_of(self)

    @scale.setter
    def scale(self, scale: float) -> None:
        set_scale(self, scale)

    @property
    def num_parameters(self) -> int:
        """How many scalars are trained."""
        return sum(p.numel() for p in self.parameters())

    @property
    def num_bytes(self) -> int:
        """How many bytes the adapter's state takes."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return what is trained, sorted by name; names are those of `model.named_parameters()`."""
        named = {plain_name(n): p for n, p in self.model.named_parameters()}
        roots = tuple(self._roots())
        names = [n for n in named if f"{SLOT}." in n and n.startswith(roots)]
        return {n: named[n] for n in sorted([*names, *self.in_place])}

    def parameters(self) -> list[nn.Parameter]:
        """Return what is trained, sorted by name."""
        return list(self.named_parameters().values())

    def parameter_groups(
        self, lr: float, weight_decay: float = 0.0, head_lr: float | None = None
    ) -> list[dict[str, Any]]:
        """Return what is trained as an optimizer's groups, each sorted by name.

        Args:
            lr: learning rate of what was added, which a method may scale (LoRA+).
            weight_decay: of matrices; biases and norms have none.
            head_lr: learning rate of what is trained in place; None takes `lr`.
        """
        return parameter_groups(self, lr, weight_decay, head_lr)

    @property
    def lr_scales(self) -> dict[str, float]:
        """By name, how many times faster a parameter learns, where it is not once."""
        methods = {f"{self.name}_{method.kind}": method for method in self.methods}
        scales = {}
        for name in self.named_parameters():
            key, _, rest = name.partition(f"{SLOT}.")[2].partition(".")
            if key in methods:
                scales[name] = methods[key].lr_scale(rest)
        return {name: scale for name, scale in scales.items() if scale != 1}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the trained tensors and the buffers that they need, by the model's own keys."""
        self._require_enabled("state_dict()")
        return {name: tensor.detach() for name, tensor in self.tensors().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy `state` into the adapter, all or nothing.

        Raises:
            AdapterError: a tensor is missing, unexpected, misshapen, of another kind or not finite.
        """
        self._require_enabled("load_state_dict()")
        own = self.tensors()
        check_state(own, state, f"adapter `{self.name}`")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])

    @contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """Within this context the model computes what it did before the injection, bitwise.

        Raises:
            AdapterError: the originals of what is trained in place were not kept.
        """
        self._require_originals("disabled()")
        active = [delta for _, _, delta in self.deltas if delta.active]
        tuned = self._swap(self._originals)
        for delta in active:
            delta.active = False
        outer, self._disabled = self._disabled, True
        try:
            yield self.model
        finally:
            self._disabled = outer
            self._swap(tuned)
            for delta in active:
                delta.active = True

    def remove(self) -> nn.Module:
        """Take the adapter out and return the model as it was before the injection, bitwise.

        Raises:
            AdapterError: the originals of what is trained in place were not kept.
        """
        self._require_enabled("remove()")
        self._require_originals("remove()")
        self._swap(self._originals)
        return self.forget()

    def forget(self) -> nn.Module:
        """Take the deltas out and return the model; what was trained in place stays as it is."""
        self._require_enabled("forget()")
        modules = _modules(self.model)
        for host, key in reversed(self._hosts):
            detach(modules[host], key)
        self._restore_flags()
        self._guard.remove()
        del _registry(self.model)[self.name]
        _tell_transformers(self.model)
        if not _registry(self.model):
            del self.model.__dict__["_adapters"]
        return self.model

    def merge(self) -> nn.Module:
        """Fold the deltas into the model's weights and return the model, now a plain one.

        What was trained in place stays as trained. The weights get new storage; where a delta
        cannot be merged nothing is changed. `merging.merge` also compares the outputs.

        Raises:
            NotMergeable: a delta cannot be folded in, or the weight is shared with another module.
        """
        self.fold()
        return self.forget()

    def fold(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Fold the deltas into the model's weights, with the deltas still there.

        Returns:
            The parameters of their hosts, and what was in them before.

        Raises:
            NotMergeable: a delta cannot be folded in; nothing is changed.
        """
        self._require_enabled("merge()")
        before = [(p, p.data) for _, host, _ in self.deltas for p in host.parameters(recurse=False)]
        try:
            self._refuse_shared()
            self._refuse_mixed()
            for _, host, delta in self.deltas:
                fold(delta, host)
        except Exception:
            for parameter, data in before:
                parameter.data = data
            raise
        return before

    def save(self, folder: str | Path) -> Path:
        """Write the adapter to `folder` as safetensors with a readable configuration."""
        from lightning_peft.files.adapter_folder import save_adapter

        return save_adapter(self, folder)

    def hold_back(self, epoch: int) -> None:
        """Drop the gradients of what a method does not train yet in `epoch` (counted from 0)."""
        named = self.named_parameters() if self.start_epochs else {}
        for name, start in self.start_epochs.items():
            if epoch < start:
                named[name].grad = None

    def _check(self, in_place: Sequence[str]) -> None:
        present = adapters_of(self.model)
        if self.name in present:
            raise AdapterError(
                f"The model already carries {present[self.name]!r}: call its `remove()` first, or "
                "give this one another `name`."
            )
        if not self.name.replace("_", "").replace("-", "").isalnum():
            raise AdapterError(
                f"`name` must be letters, digits, `_` and `-`, but is {self.name!r} instead."
            )
        if taken := {n for a in present.values() for n in a.in_place} & set(in_place):
            raise AdapterError(f"`{min(taken)}` is already trained in place by another adapter.")

    def _restore_flags(self) -> None:
        # What an adapter that came later found in this one's way, it must not restore.
        names = list(_registry(self.model))
        for later in names[names.index(self.name) + 1 :][:1]:
            heir = _registry(self.model)[later]
            heir._required |= self._required
            heir._held = [*self._held, *heir._held]
            return
        for module in reversed(self._held):
            release(module)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required.get(plain_name(name), False))

    def _unwind(self) -> None:
        modules = _modules(self.model)
        for host, key in reversed(self._hosts):
            detach(modules[host], key)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required[plain_name(name)])

    def _require_present(self) -> None:
        if self.model.__dict__.get("_adapters", {}).get(self.name) is not self:
            raise AdapterError(
                f"Adapter `{self.name}` is no longer in the model: it was removed or merged."
            )

    def _require_enabled(self, what: str) -> None:
        self._require_present()
        if self._disabled:
            raise AdapterError(
                f"`{what}` within `disabled()` would take the base for what was trained: call it "
                "after that context."
            )

    def _roots(self) -> list[str]:
        return [f"{host}.{SLOT}.{key}.".lstrip(".") for host, key in self._hosts]

    def _set_aside(self) -> dict[str, Tensor] | None:
        # The base's own storage is put aside and a copy is trained: pointers suffice to go back.
        originals = {name: t.detach() for name, t in self._in_place_tensors().items()}
        in_place = set(self.in_place)
        for name, parameter in self.model.named_parameters():
            if plain_name(name) in in_place:
                if not parameter.is_floating_point():
                    raise AdapterError(f"`{name}` is {parameter.dtype} and cannot be trained.")
                parameter.requires_grad_(True)
        if not all(method.keeps_original for method in self.methods):
            return None
        self._swap({name: tensor.clone() for name, tensor in originals.items()})
        return originals

    def _in_place_tensors(self) -> dict[str, Tensor]:
        owners = {name.rpartition(".")[0] for name in self.in_place}
        modules = _modules(self.model)
        named = {plain_name(n): p for n, p in self.model.named_parameters()}
        tensors: dict[str, Tensor] = {name: named[name] for name in self.in_place}
        for owner in sorted(owners):
            module = modules[owner]
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    tensors[f"{owner}.{name}".lstrip(".")] = buffer
        return tensors

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of `state_dict()` themselves, not detached."""
        tensors: dict[str, Tensor] = dict(self.named_parameters())
        for root, (_, _, delta) in zip(self._roots(), self.deltas, strict=True):
            tensors |= {f"{root}{name}": buffer for name, buffer in delta.named_buffers()}
        return tensors | (self._in_place_tensors() if self.in_place else {})

    def _swap(self, tensors: dict[str, Tensor] | None) -> dict[str, Tensor]:
        present = self._in_place_tensors() if tensors else {}
        pairs = {name: (present[name], tensor) for name, tensor in (tensors or {}).items()}
        for name, (target, tensor) in pairs.items():
            _refuse_exchange(name, target, tensor)
        replaced = {name: target.detach() for name, (target, _) in pairs.items()}
        for target, tensor in pairs.values():
            target.data = tensor.to(target.device, target.dtype)
        return replaced

    def _require_originals(self, what: str) -> None:
        if self._originals is None:
            raise AdapterError(
                f"`{what}` needs the weights from before the training, which were not kept: "
                "set `keep_original=True` in the method."
            )

    def _refuse_shared(self) -> None:
        modules = self.model.modules()
        owners = Counter(id(p) for module in modules for p in module._parameters.values())
        for name, host, delta in self.deltas:
            shared = any(owners[id(p)] > 1 for p in host.parameters(recurse=False))
            if shared and not delta.merges_shared:
                raise NotMergeable(f"`{name}` shares its weight with another module.")

    def _refuse_mixed(self) -> None:
        # Folded one after another, changes that build on each other would give something else.
        for name, host, delta in self.deltas:
            others = [other for other in slot_of(host).values() if other is not delta]
            if others and not all(d.additive for d in (delta, *others)):
                raise NotMergeable(
                    f"`{name}` is changed by {type(delta).__name__} and by "
                    f"{type(others[0]).__name__}, which do not simply add up: remove one of them."
                )


def check_state(own: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str) -> None:
    """Refuse a `state` that is not exactly what `own` tensors can hold.

    Raises:
        AdapterError: a tensor is missing, unexpected, misshapen, of another kind or not finite.
    """
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if extra:
        raise AdapterError(
            f"`{extra[0]}` is unexpected in {where} ({len(extra)} in all)."
            f"{near_misses(extra[0], missing)}"
        )
    if missing:
        raise AdapterError(f"`{missing[0]}` is missing in {where} ({len(missing)} in all).")
    for name, tensor in own.items():
        _check_tensor(name, tensor, state[name])


def _check_tensor(name: str, own: Tensor, new: Any) -> None:
    if not isinstance(new, Tensor):
        raise AdapterError(f"`{name}` must be a tensor, but is {type(new).__name__} instead.")
    if own.shape != new.shape:
        raise AdapterError(
            f"`{name}` must have shape {tuple(own.shape)}, but has {tuple(new.shape)} instead."
        )
    if own.is_floating_point() != new.is_floating_point():
        raise AdapterError(f"`{name}` must be {own.dtype}, but is {new.dtype} instead.")
    if new.is_floating_point() and not new.isfinite().all():
        raise AdapterError(f"`{name}` holds NaN or infinite values.")


def _refuse_exchange(name: str, present: Tensor, other: Tensor) -> None:
    if type(present.data) is not torch.Tensor:
        raise AdapterError(f"`{name}` is sharded over processes and cannot be exchanged.")
    if other.is_meta and not present.is_meta:
        raise AdapterError(
            f"`{name}` had no values yet at the injection, since the model was on the meta device: "
            "there is nothing to go back to; fill the model first, then inject."
        )


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    named = model.named_modules(remove_duplicate=False)
    return {plain_name(name): module for name, module in named}


def _registry(model: nn.Module) -> dict[str, Adapter]:
    registry: dict[str, Adapter] = model.__dict__.setdefault("_adapters", {})
    return registry


def _refuse_partial(
    model: nn.Module, state: Mapping[str, Any], prefix: str, _: Any, __: bool, *lists: list[str]
) -> None:
    # A state dict of the bare base holds no tensor of an adapter; any other must hold all of them.
    missing = lists[0]
    for adapter in model.__dict__["_adapters"].values():
        own = {f"{prefix}{name}" for name in adapter.tensors() if SLOT in name.split(".")}
        lost = own - state.keys() - set(missing) if own & state.keys() else ()
        missing.extend(map(Unforgivable, sorted(lost)))


def _hold_frozen_norms(model: nn.Module, in_place: Sequence[str]) -> list[nn.Module]:
    trained = {name.rpartition(".")[0] for name in in_place}
    norms = [m for n, m in _modules(model).items() if isinstance(m, _NORM) and n not in trained]
    return [hold_in_eval(norm) for norm in norms if _has_statistics(norm)]


def _has_statistics(norm: Any) -> bool:
    # Another adapter may hold the norm already, and a shared one is met twice.
    return norm.track_running_stats and not isinstance(norm, HeldInEval)


def _tell_transformers(model: nn.Module) -> None:
    """Keep what adapters added out of `save_pretrained`, by transformers' own list for that."""
    for module in model.modules():
        if is_transformers(module):  # before 5.9 the list is the class's, and None when empty
            ignored = getattr(module, "_keys_to_ignore_on_save", None) or ()
            kept = {name for name in ignored if f"{SLOT}." not in name}
            added = {name for name in module.state_dict() if f"{SLOT}." in name}
            module.__dict__["_keys_to_ignore_on_save"] = kept | added
