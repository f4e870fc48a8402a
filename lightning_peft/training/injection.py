"""What a callback or a PEFTModule is asked to inject: plain settings, stored in checkpoints."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_peft.adapter import Adapter
from lightning_peft.carrying.group import AdapterGroup, Views, check_groupable
from lightning_peft.carrying.registry import adapters_of
from lightning_peft.config import instantiate_as, to_spec
from lightning_peft.errors import AdapterError
from lightning_peft.files.adapter_folder import load_adapter
from lightning_peft.method import Method, inject
from lightning_peft.strategies.checks import refuse_wrapped
from lightning_peft.structure.anatomy import head_parameters
from lightning_peft.structure.targets import Patterns, as_patterns, trained_in_place


@dataclass(frozen=True)
class Injection:
    """The arguments of `inject`, and where in the LightningModule the model is."""

    methods: tuple[Method, ...]
    """The methods, in order."""

    name: str = "default"
    """The adapter's name."""

    train: Patterns = ()
    """Patterns of further modules or parameters that are trained in place."""

    head: bool = True
    """Whether the fresh task head is trained in place."""

    beside: Mapping[str, str] = field(default_factory=dict)
    """Folders of trained adapters to load first, by name: to be fused or switched to later; one of
    the injection's own name is trained further."""

    adapters: tuple[str, ...] = ()
    """Names of adapters to train side by side, each with all of this; empty trains one, `name`."""

    within: str = ""
    """The attribute of the LightningModule to inject; empty for the LightningModule itself."""

    def into(self, module: nn.Module) -> Adapter | AdapterGroup:
        """Inject into a LightningModule, or take over the equal adapter that it carries.

        Raises:
            AdapterError: the base is wrapped or sharded, or carries another adapter of this name.
            TargetError: a pattern matches nothing.
        """
        model = module.get_submodule(self.within)
        for name, folder in self.beside.items():
            if name not in adapters_of(module):
                refuse_wrapped(model)
                load_adapter(model, folder, name)
        if not self.adapters:
            return self._one(module, model, self.name)
        check_groupable(self.methods)
        places = model if isinstance(model, Views) else dict.fromkeys(self.adapters, model)
        found = {name: self._one(module, places[name], name) for name in self.adapters}
        return AdapterGroup(model, found).settle()

    def found_in(self, module: nn.Module) -> Adapter | AdapterGroup | None:
        """Return what `into` has injected; None where it has not, or it was taken out."""
        present = adapters_of(module)
        if not self.adapters:
            return present.get(self.name)
        if not all(name in present for name in self.adapters):
            return None
        model = module.get_submodule(self.within)
        return AdapterGroup(model, {name: present[name] for name in self.adapters})

    def _one(self, module: nn.Module, model: nn.Module, name: str) -> Adapter:
        if found := adapters_of(module).get(name):
            self._require_equal(found)
            _require_frozen_around(found, module)
            return found
        refuse_wrapped(model)
        return inject(model, self.methods, name, train=self.train, head=self.head)

    def to_spec(self) -> dict[str, Any]:
        """Return the settings in plain containers."""
        return {
            "name": self.name,
            "methods": [to_spec(method) for method in self.methods],
            "train": list(as_patterns(self.train)),
            "head": self.head,
            "beside": dict(self.beside),
        } | ({"adapters": list(self.adapters)} if self.adapters else {})

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> "Injection":
        """Return the settings that `to_spec` gave."""
        methods = tuple(instantiate_as(Method, method) for method in spec["methods"])
        beside = spec.get("beside", {})  # which earlier versions had not
        adapters = tuple(spec.get("adapters", ()))
        return cls(methods, spec["name"], tuple(spec["train"]), spec["head"], beside, adapters)

    def _require_equal(self, found: Adapter) -> None:
        in_place = {name for method in self.methods for name in method.in_place(found.model)}
        in_place |= {*(trained_in_place(found.model, self.train) if self.train else ())}
        in_place |= {*(head_parameters(found.model) if self.head else ())}
        if found.methods != self.methods or set(found.in_place) != in_place:
            raise AdapterError(
                f"The model already carries {found!r}, which trains "
                f"{len(found.in_place)} tensors in place, and not what is asked for "
                f"({', '.join(map(repr, self.methods))}, {len(in_place)} in place): take it out "
                "with its `remove()`, or build the model anew."
            )


def _require_frozen_around(adapter: Adapter, module: nn.Module) -> None:
    own = set(map(id, adapter.model.parameters()))
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and id(parameter) not in own:
            raise AdapterError(
                f"`{name}` is trainable, but lies outside of the model that carries the adapter "
                "and would neither be trained nor saved: freeze it, or leave out `inject` and let "
                "the PEFT callback inject into the whole module."
            )


def as_methods(methods: Method | Sequence[Method]) -> tuple[Method, ...]:
    """Return one method or several as a tuple."""
    return (methods,) if isinstance(methods, Method) else tuple(methods)
