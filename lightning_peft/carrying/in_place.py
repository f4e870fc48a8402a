"""The model's own tensors that an adapter trains: a head, biases, norms, whole layers.

They are trained where they are, under the names that they have, in a copy: the base's own storage
is put aside, and pointers suffice to go back. Once another adapter takes their place they move out
(`Parked`) and act from there: any number of adapters can then train the same head.
"""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_peft.carrying.registry import modules_of
from lightning_peft.delta import SLOT, Delta, Slot, attach, detach, plain_name, slot_of
from lightning_peft.errors import AdapterError
from lightning_peft.training.modes import forget_computed

Tensors = dict[str, Tensor]


class Parked(Delta):
    """An adapter's own values of a module's tensors, which are read instead of the base's."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def reweigh(self, host: nn.Module, name: str, weight: Tensor) -> Tensor:
        """Return the adapter's own tensor."""
        own = self._parameters.get(name, self._buffers.get(name))
        return weight if own is None else own

    def merge(self, module: nn.Module) -> None:
        """Give the module the adapter's tensors."""
        for name, own in self.state_dict().items():
            target: Any = module._parameters.get(name, module._buffers.get(name))
            target.data = own.clone()

    def _apply(self, fn: Any, recurse: bool = True) -> "Parked":
        return cast(Parked, nn.Module._apply(self, fn, recurse))  # of the base's precision


class InPlace:
    """What one adapter trains in place, and what the base has there.

    Args:
        model: which carries the adapter.
        name: the adapter's name.
        names: of the parameters, in any order.
    """

    parked = False
    """Whether the tensors have moved out of the model's own."""

    originals: Tensors | None
    """What the base has in their place; None when it was not kept."""

    def __init__(self, model: nn.Module, name: str, names: Iterable[str]) -> None:
        self.model, self.key = model, f"{name}_own"
        self.names = sorted({plain_name(name) for name in names})
        self.originals = {}

    def take(self, keep: bool) -> None:
        """Train the parameters, and keep the base's values to go back to.

        Raises:
            AdapterError: a parameter cannot be trained.
        """
        present = self._present()
        found = {name: tensor.detach() for name, tensor in present.items()}
        for name in self.names:
            if not found[name].is_floating_point():
                raise AdapterError(f"`{name}` is {found[name].dtype} and cannot be trained.")
        self.originals = found if keep else None
        if keep:
            self.exchange({name: tensor.clone() for name, tensor in found.items()})
        for name in self.names:
            cast(nn.Parameter, present[name]).requires_grad_(True)

    def tensors(self) -> Tensors:
        """Return the adapter's tensors, and buffers beside them, by the model's own names."""
        if not self.parked:
            return self._present()
        places = self._places()
        return {
            places[owner][name]: tensor
            for owner, delta in reversed(self.deltas().items())  # a tied one has its first name
            for name, tensor in delta.state_dict(keep_vars=True).items()
        }

    def deltas(self) -> dict[str, Parked]:
        """Return what stands in for the model's own tensors, by the name of the module."""
        if not self.parked:
            return {}
        modules = modules_of(self.model)
        return {owner: cast(Parked, slot_of(modules[owner])[self.key]) for owner in self._places()}

    def keys(self) -> set[str]:
        """Return the keys of what moved out, in the model's state dict."""
        return {
            f"{owner}.{SLOT}.{self.key}.{name}".lstrip(".")
            for owner, delta in self.deltas().items()
            for name in delta.state_dict()
        }

    def park(self) -> list[Slot]:
        """Move the tensors out of the model's own, which are the base's again.

        Returns:
            Where they are now.

        Raises:
            AdapterError: the base's were not kept.
        """
        self.require_originals("deactivate()")
        own, modules = self.exchange(self.originals or {}), modules_of(self.model)
        own |= {name: nn.Parameter(own[name]) for name in self.names}
        slots = [
            attach(modules[owner], self.key, Parked({key: own[n] for key, n in names.items()}))
            for owner, names in self._places().items()
        ]
        self.parked, self.originals = True, {}
        return slots

    def replaced(self, what: str) -> dict[str, Tensors]:
        """Return by module, and by its name there, what the base has in place of each tensor.

        Raises:
            AdapterError: it was not kept, which `what` needs.
        """
        self.require_originals(what)
        kept = self.originals or {}
        return {
            owner: {key: kept[name] for key, name in names.items()}
            for owner, names in self._places().items()
        }

    def unpark(self) -> None:
        """Move the tensors back into the model's own."""
        own = self.tensors()
        self.discard()
        self.originals = self.exchange({name: tensor.detach() for name, tensor in own.items()})

    def discard(self) -> None:
        """Take out what moved out of the model's own tensors."""
        modules = modules_of(self.model)
        for owner in self.deltas():
            detach(modules[owner], self.key)
        self.parked = False

    def require_originals(self, what: str) -> None:
        """Refuse `what` when there is nothing to go back to.

        Raises:
            AdapterError: there is not.
        """
        if self.originals is None:
            raise AdapterError(
                f"`{what}` needs the weights from before the training, which were not kept: "
                "set `keep_original=True` in the method."
            )

    def _places(self) -> dict[str, dict[str, str]]:
        """Return, by module, the names that it has for tensors and the model's names for them."""
        present = {id(tensor): name for name, tensor in self._present().items()}
        places: dict[str, dict[str, str]] = {}
        for owner, module in self.model.named_modules():
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if id(tensor) in present and not isinstance(module, Parked):
                    places.setdefault(plain_name(owner), {})[key] = present[id(tensor)]
        return places

    def _present(self) -> Tensors:
        if not self.names:
            return {}
        modules = modules_of(self.model)
        named = {plain_name(n): p for n, p in self.model.named_parameters()}
        tensors: Tensors = {name: named[name] for name in self.names}
        for owner in sorted({name.rpartition(".")[0] for name in self.names}):
            module = modules[owner]
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    tensors[f"{owner}.{name}".lstrip(".")] = buffer
        return tensors

    def exchange(self, tensors: Tensors) -> Tensors:
        """Put `tensors` in the place of the model's own, by pointer, and return those."""
        present = self._present() if tensors else {}
        pairs = {name: (present[name], tensor) for name, tensor in tensors.items()}
        for name, (target, tensor) in pairs.items():
            _refuse_exchange(name, target, tensor)
        replaced = {name: target.detach() for name, (target, _) in pairs.items()}
        for target, tensor in pairs.values():
            target.data = tensor.to(target.device, target.dtype)
        modules = modules_of(self.model) if pairs else {}
        for owner in {name.rpartition(".")[0] for name in pairs}:
            forget_computed(modules[owner])
        return replaced


def _refuse_exchange(name: str, present: Tensor, other: Tensor) -> None:
    if type(present.data) is not torch.Tensor:
        raise AdapterError(f"`{name}` is sharded over processes and cannot be exchanged.")
    if other.is_meta and not present.is_meta:
        raise AdapterError(
            f"`{name}` had no values yet at the injection, since the model was on the meta device: "
            "there is nothing to go back to; fill the model first, then inject."
        )
