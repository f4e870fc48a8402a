"""The handle on what was injected into a model."""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lightning_peft.carrying.in_place import InPlace
from lightning_peft.carrying.placed import Placed
from lightning_peft.carrying.registry import (
    adapters_of,
    modules_of,
    refuse_clash,
    registry_of,
    tell_transformers,
)
from lightning_peft.carrying.state import check_state
from lightning_peft.delta import SLOT, Delta, NotMergeable, Slot, plain_name
from lightning_peft.errors import AdapterError
from lightning_peft.fingerprint import fingerprint_for
from lightning_peft.merging.folding import Opened, fold_all
from lightning_peft.merging.scaling import scale_of, set_scale
from lightning_peft.structure.anatomy import head_parameters
from lightning_peft.training.optimizers import lr_scales, parameter_groups

if TYPE_CHECKING:
    from lightning_peft.method import Method


class Adapter:
    """What one call of `inject` added to a model: its parameters, its state, and the way back.

    A model can carry several. Those that are active act, one after another; what was injected or
    loaded last is the one that is active, until `switch` or `activate` says otherwise.

    Attributes:
        model: the module that was injected.
        name: the adapter's name.
        methods: the methods, in order.
        active: whether it acts.
        trainable: whether its parameters require gradients.
    """

    active = trainable = True
    _tuned: dict[str, Tensor] | None = None  # what it has in place, while it is disabled

    def __init__(
        self,
        model: nn.Module,
        name: str,
        methods: Sequence["Method"],
        deltas: Sequence[tuple[str, str, Delta]],
        in_place: Sequence[str],
    ) -> None:
        self.model, self.name, self.methods = model, name, tuple(methods)
        present = adapters_of(model)
        self._check_place(present)
        self._found = {a: a.trainable for a in present.values() if a.active}
        self._placed, self._own = Placed(model), InPlace(model, name, in_place)
        registry = registry_of(model)
        try:
            for other in present.values():
                other._step_back()
            model.requires_grad_(False)
            for host, key, delta in deltas:
                self._placed.attach(host, key, delta)
            if in_place:
                self._own.take(keep=all(method.keeps_original for method in methods))
        except BaseException:
            self._take_out()
            raise
        registry[name] = self
        registry.hold_norms()
        tell_transformers(model)

    def __repr__(self) -> str:
        methods = ", ".join(repr(method) for method in self.methods)
        return f"Adapter({self.name!r}, [{methods}], {self.num_parameters:,} parameters)"

    @property
    def in_place(self) -> list[str]:
        """The names of the model's own parameters that it trains, sorted."""
        return self._own.names

    @property
    def beside_methods(self) -> set[str]:
        """The names of the head, and of what is trained in place besides what the methods name."""
        named = {plain_name(n) for method in self.methods for n in method.in_place(self.model)}
        return set(self.in_place) - (named - set(map(plain_name, head_parameters(self.model))))

    @property
    def deltas(self) -> list[tuple[str, nn.Module, Delta]]:
        """The host's name, the host and the delta, for each delta in the order of attachment."""
        self._require_present()
        return self._placed.deltas()

    def deltas_of(self, method: "Method") -> dict[str, Delta]:
        """Return the deltas of one of the adapter's methods by the name of their host."""
        return self._placed.named(f"{self.name}_{method.kind}")

    @functools.cached_property
    def base_fingerprint(self) -> dict[str, Any]:
        """The fingerprint of the frozen base, which never changes and is thus taken once."""
        return fingerprint_for(self.model, set(self.tensors()), self)

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
        """Return what is trained, sorted by name.

        Names are those of `model.named_parameters()`; what is trained in place keeps the model's
        name also while another adapter stands in its place.
        """
        own = self._own.tensors()
        found = self._added(self.model.named_parameters()) | {n: own[n] for n in self.in_place}
        return {name: cast(nn.Parameter, found[name]) for name in sorted(found)}

    def parameters(self) -> list[nn.Parameter]:
        """Return what is trained, sorted by name."""
        return list(self.named_parameters().values())

    def parameter_groups(
        self, lr: float, weight_decay: float = 0.0, head_lr: float | None = None
    ) -> list[dict[str, Any]]:
        """Return what is trained as an optimizer's groups, each sorted by name.

        Args:
            lr: learning rate of what the methods train, which one may scale (LoRA+).
            weight_decay: of matrices; biases and norms have none.
            head_lr: learning rate of the head and of what else is trained in place besides what
                the methods (Freeze, full fine-tuning) name; None takes `lr`.
        """
        return parameter_groups(self, lr, weight_decay, head_lr)

    @property
    def lr_scales(self) -> dict[str, float]:
        """By name, how many times faster a parameter learns, where it is not once."""
        return lr_scales(self)

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

    def requires_grad_(self, requires_grad: bool = True) -> "Adapter":
        """Let its parameters be trained, or freeze them; whether it is active does not matter."""
        self.trainable = requires_grad
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad)
        return self

    def activate(self) -> "Adapter":
        """Let it act, besides the others that are active.

        Raises:
            AdapterError: an active one trains the same parameter in place.
        """
        self._require_present()
        self.require_unmixed("activate()")
        self._enable()
        if not self.active:
            registry = registry_of(self.model)
            refuse_clash([self, *(other for other in registry.values() if other.active)])
            self._let_act(True)
            registry.hold_norms()
        return self

    def deactivate(self) -> "Adapter":
        """Let the model compute as if it were not there; it keeps what it has learnt.

        What it trains in place moves out of the model's own tensors, which are the base's again.
        An optimizer that was made before holds the model's tensors: make it anew.

        Raises:
            AdapterError: the originals of what is trained in place were not kept.
        """
        self.require_switchable("deactivate()")
        if self.active:
            if self.in_place and not self._own.parked:
                self._park()
            self._let_act(False)
            registry_of(self.model).hold_norms()
        return self

    def _step_back(self) -> None:
        self.deactivate()
        self.trainable = False

    def settle(self) -> "Adapter":
        """Let it act and be trained, with what it has in place in the model's own tensors.

        Unless it acts already, beside others that `switch` named, it acts alone.
        """
        for other in [] if self.active else adapters_of(self.model).values():
            other.deactivate()
        self.activate()
        if self._own.parked:
            self._placed.forget_parked()
            self._own.unpark()
            tell_transformers(self.model)
        return self.requires_grad_()

    def require_switchable(self, what: str) -> None:
        """Refuse `what` where the adapter could not be let act, or not any more.

        Raises:
            AdapterError: this is within a `disabled()` or `mixed()`, or the originals of what it
                trains in place were not kept.
        """
        self._require_enabled(what)
        self.require_unmixed(what)
        if self.active:
            self._own.require_originals(what)

    def require_unmixed(self, what: str) -> None:
        """Refuse `what` where each row of a batch has adapters of its own at this time.

        Raises:
            AdapterError: this is within a `mixed()`.
        """
        if self.model.__dict__["_adapters"].entered is not None:
            raise AdapterError(
                f"`{what}` within `mixed()` would end the mixture: call it after that context; "
                "rows without any adapter are `mixed(model, [None, ...])`."
            )

    @property
    def is_disabled(self) -> bool:
        """Whether this is within its `disabled()`."""
        return self._tuned is not None

    def placed(self) -> list[tuple[Slot, str]]:
        """Return where each of its deltas is: the slot of its host, and its name there."""
        return list(self._placed.slots)

    def replaced(self, what: str) -> dict[str, dict[str, Tensor]]:
        """Return by module and name the base's values of what it has in the model's own tensors.

        Raises:
            AdapterError: they were not kept, which `what` needs.
        """
        settled = self.active and not self.is_disabled and not self._own.parked
        return self._own.replaced(what) if self.in_place and settled else {}

    @contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """Within this context the model computes what it did before the injection, bitwise.

        Raises:
            AdapterError: the originals of what is trained in place were not kept.
        """
        self._require_present()
        self.require_unmixed("disabled()")
        if not self.active or self._tuned is not None:
            yield self.model
            return
        self._own.require_originals("disabled()")
        self._tuned = self._own.exchange(self._own.originals or {})
        self._let_act(False)
        try:
            yield self.model
        finally:
            self._enable()

    def remove(self) -> nn.Module:
        """Take the adapter out and return the model as it was before the injection, bitwise.

        Raises:
            AdapterError: the originals of what is trained in place were not kept.
        """
        self._require_enabled("remove()")
        self.require_unmixed("remove()")
        self._own.require_originals("remove()")
        self._own.exchange(self._own.originals or {})
        return self._take_out()

    def forget(self, *, hand_back: bool = True) -> nn.Module:
        """Take the deltas out and return the model; what was trained in place stays as it is.

        Args:
            hand_back: whether those that acted before it act again.
        """
        self._require_enabled("forget()")
        self.require_unmixed("forget()")
        self._found = self._found if hand_back else {}
        return self._take_out()

    def merge(self) -> nn.Module:
        """Fold the deltas into the model's weights and return the model, now a plain one.

        What was trained in place stays as trained. The weights get new storage; where a delta
        cannot be merged nothing is changed. `merging.merge` also compares the outputs.

        Raises:
            NotMergeable: a delta cannot be folded in, or the weight is shared with another module.
        """
        self.fold()
        return self.forget(hand_back=False)  # the model goes on to compute what it computed

    def fold(self, opened: Opened = nullcontext) -> list[tuple[Tensor, Tensor]]:
        """Fold the deltas into the model's weights, with the deltas still there.

        Args:
            opened: makes a context that is entered around each host while it is folded into.

        Returns:
            The tensors of their hosts, and what was in them before.

        Raises:
            NotMergeable: a delta cannot be folded in; nothing is changed.
        """
        self._require_enabled("merge()")
        self.require_unmixed("merge()")
        if not self.active:
            raise NotMergeable(
                f"`{self.name}` does not act, so that its change would come on top of what does: "
                "`switch` to it first."
            )
        parked = [(name, modules_of(self.model)[name], d) for name, d in self._own.deltas().items()]
        return fold_all(self.model, self.deltas, parked, opened)

    def save(self, folder: str | Path) -> Path:
        """Write the adapter to `folder` as safetensors with a readable configuration."""
        from lightning_peft.files.adapter_folder import save_adapter

        return save_adapter(self, folder)

    def export(
        self,
        folder: str | Path,
        format: str = "peft",  # noqa: A002
        part: str | None = None,
    ) -> Path:
        """Write the adapter, or its method `part` alone, to `folder` for another library.

        Raises:
            AdapterError: the format cannot hold it; the message says why.
        """
        from lightning_peft.files.formats import export_adapter

        return export_adapter(self, folder, format, part)

    def push(self, repository: str, **settings: Any) -> str:
        """Write the adapter to `org/name` on the Hugging Face hub and return the commit's address.

        Args:
            repository: `org/name`; where it is not there, it is made, and is private.
            settings: those of `files.hub.push`, such as `subfolder`, `private` and `message`.

        Raises:
            CheckpointError: the hub refuses; the message says why.
        """
        from lightning_peft.files.hub import push

        return push(self, repository, **settings)

    def hold_back(self, epoch: int) -> None:
        """Drop the gradients of what a method does not train yet in `epoch` (counted from 0)."""
        named = self.named_parameters() if self.start_epochs else {}
        for name, start in self.start_epochs.items():
            if epoch < start:
                named[name].grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of `state_dict()` themselves, not detached."""
        buffers = {
            f"{root}{name}": buffer
            for root, (_, _, delta) in zip(self._placed.prefixes(), self.deltas, strict=True)
            for name, buffer in delta.named_buffers()
        }
        return {**self.named_parameters(), **buffers, **self._own.tensors()}

    def added_keys(self) -> set[str]:
        """Return the keys that the adapter adds to the model's state dict."""
        return {key for key in self.tensors() if SLOT in key.split(".")} | self._own.keys()

    def _check_place(self, present: Mapping[str, "Adapter"]) -> None:
        for other in present.values():  # an exit from either context would undo half of this
            other._require_enabled("inject()")
            other.require_unmixed("inject()")
        if self.name in present:
            raise AdapterError(
                f"The model already carries {present[self.name]!r}: call its `remove()` first, or "
                "give this one another `name`."
            )
        if not self.name.replace("_", "").replace("-", "").isalnum():
            raise AdapterError(
                f"`name` must be letters, digits, `_` and `-`, but is {self.name!r} instead."
            )

    def _let_act(self, active: bool) -> None:
        self.active = active
        self._placed.let_act(active)

    def _enable(self) -> None:
        if self._tuned is not None:
            self._own.exchange(self._tuned)
            self._tuned = None
            self._let_act(True)

    def _park(self) -> None:
        self._freeze_in_place()
        self._placed.slots += [(slot, self._own.key) for slot in self._own.park()]
        self.requires_grad_(self.trainable)
        tell_transformers(self.model)

    def _take_out(self) -> nn.Module:
        registry, was_active = registry_of(self.model), self.active
        registry.pop(self.name, None)
        self._detach()
        if not registry:
            registry.close(self.model)
            del self.model.__dict__["_adapters"]
        else:
            registry.hold_norms()
        # What acts by now was chosen since: then nothing is handed back.
        alone = was_active and not any(a.active for a in adapters_of(self.model).values())
        for other, trainable in self._found.items() if alone else ():
            if adapters_of(other.model).get(other.name) is other:
                other.activate().requires_grad_(trainable)
        tell_transformers(self.model)
        return self.model

    def _detach(self) -> None:
        self._placed.detach()
        if self._own.parked:
            self._own.discard()
        else:
            self._freeze_in_place()

    def _freeze_in_place(self) -> None:
        for name, parameter in self.model.named_parameters():
            if plain_name(name) in self.in_place:
                parameter.requires_grad_(False)

    def _require_present(self) -> None:
        if self.model.__dict__.get("_adapters", {}).get(self.name) is not self:
            raise AdapterError(
                f"Adapter `{self.name}` is no longer in the model: it was removed or merged."
            )

    def _require_enabled(self, what: str) -> None:
        self._require_present()
        if self._tuned is not None:
            raise AdapterError(
                f"`{what}` within `disabled()` would take the base for what was trained: call it "
                "after that context, or in a copy `activate()` first."
            )

    def _added(self, named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        roots = tuple(self._placed.prefixes())
        plain = ((plain_name(name), tensor) for name, tensor in named)
        return {n: t for n, t in plain if f"{SLOT}." in n and n.startswith(roots)}
