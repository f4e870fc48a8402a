"""Putting mixtures in the place of the deltas of a model, and the deltas back.

While a batch is mixed, each host's slot runs one `Mixture` of what its adapters have there. What an
adapter has in the model's own tensors (a head) stays where it is, so that an optimizer made before
keeps its parameters: the rows of the others read the base's values through `StandIn`s instead.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_peft.delta import SLOT, Delta, Slot, attach, detach, slot_of
from lightning_peft.deltas.cached_keys import CachedKeys
from lightning_peft.deltas.mixed import Apart, Mixture, Parting, overrides
from lightning_peft.deltas.ragged import reaching
from lightning_peft.deltas.virtual_tokens import Enter, Leave, Virtual
from lightning_peft.marker import subclass, superclass
from lightning_peft.ops.rows import Key, Plan
from lightning_peft.registry import Registry, modules_of
from lightning_peft.scaling import Part
from lightning_peft.structure import anatomy, batch

_APART = "_peft_apart"

Signs = Mapping[Key, Hashable]

Acting = dict[tuple[int, str], tuple[str, bool]]
"""By slot and name of a delta, an adapter, and whether it acts on the rows with or without that."""


class StandIn(Delta):
    """The base's values of tensors in whose place an adapter has its own."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.__dict__["tensors"] = dict(tensors)  # of no state dict
        self.active = False

    def reweigh(self, host: nn.Module, name: str, weight: Tensor) -> Tensor:
        """Return the base's tensor."""
        tensors: dict[str, Tensor] = self.__dict__["tensors"]
        return tensors.get(name, weight)


class Mix:
    """The state of a model while its batches are mixed.

    Args:
        model: which carries the adapters.
        present: its adapters.
        keys: the adapters of each row.
    """

    def __init__(self, model: nn.Module, present: Registry, keys: Sequence[Key]) -> None:
        self.model, self.present = model, present
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.plan = Plan(keys, device)
        self.stand_ins: list[tuple[nn.Module, str]] = []
        self.slots: list[tuple[str, Slot, list[Delta]]] = []
        self.marked: list[tuple[nn.Module, Any]] = []

    def enter(self) -> None:
        """Put the mixtures in place."""
        modules = modules_of(self.model)
        acts = self._acting(modules)
        for name, host in _hosts(modules).items():
            self.slots.append((name, slot_of(host), slot_of(host).running))
            slot_of(host).running = []
        rowless, read = self._rowless(), anatomy.read_by_parents(self.model)
        partings: dict[str, list[Signs]] = {}
        mixtures: dict[str, Mixture] = {}
        for name, slot, _ in self.slots:
            chains = reaching({key: _chain(slot, acts, key) for key in set(self.plan.keys)})
            if any(chains.values()):
                wholly = name in rowless
                signs = _distinct({key: _sign(chain, wholly) for key, chain in chains.items()})
                read_outside = name in read or anatomy.is_uncalled(modules[name])
                place = name.rpartition(".")[0] if read_outside else name
                place = rowless.get(place, place)
                mixtures[name] = Mixture(name, self.plan, chains, signs if place == name else None)
                slot.running = [mixtures[name]]
                partings.setdefault(place, []).extend([signs] if signs else [])
        for name, found in partings.items():
            if found:
                merged = {key: tuple(signs[key] for signs in found) for key in found[0]}
                self._mark(name, modules[name], merged, mixtures.get(name))

    def leave(self) -> None:
        """Put the deltas back."""
        for module, outer in reversed(self.marked):
            if outer is None:
                del module.__dict__[_APART]
                module.__class__ = superclass(type(module))
            else:
                module.__dict__[_APART] = outer
        for _, slot, running in self.slots:
            if any(isinstance(delta, Mixture) for delta in running):
                slot.running = running  # this context lies in another one
            else:
                slot.refresh()
        for module, key in reversed(self.stand_ins):
            detach(module, key)

    def _acting(self, modules: Mapping[str, nn.Module]) -> Acting:
        """Return by slot and name for which rows a delta acts; the base's stand-ins are put in."""
        acts: Acting = {}
        for adapter in self.present.values():
            acts |= {(id(slot), name): (adapter.name, True) for slot, name in adapter.placed()}
            for owner, tensors in adapter.replaced("mixed()").items():
                host, key = modules[owner], f"{adapter.name}_base"
                if SLOT not in host._modules or key not in slot_of(host):
                    attach(host, key, StandIn(tensors))
                    self.stand_ins.append((host, key))
                acts[id(slot_of(host)), key] = adapter.name, False
        return acts

    def _rowless(self) -> Mapping[str, str]:
        if self.present.rowless is None:
            self.present.rowless = batch.rowless(self.model)
        return self.present.rowless

    def _mark(self, name: str, module: nn.Module, signs: Signs, mixture: Mixture | None) -> None:
        trained = [
            key
            for key in signs
            if any(name == n.rpartition(".")[0] for a in key for n in self.present[a].in_place)
        ]
        self.marked.append((module, module.__dict__.get(_APART)))
        if _APART not in module.__dict__:
            module.__class__ = subclass(cast(type, type(module)), Apart)
        module.__dict__[_APART] = Parting(name, self.plan, signs, mixture, trained)


def _hosts(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the modules with deltas, each under one name."""
    names = {id(m): name for name, m in reversed([*modules.items()]) if SLOT in m._modules}
    return {name: modules[name] for name in names.values()}


def _chain(slot: Slot, acts: Acting, key: Key) -> list[Delta]:
    """Return what acts on the rows of a key, the base's own values first."""
    found = []
    for name, delta in slot.items():
        adapter, present = acts.get((id(slot), name), ("", True))
        if (adapter in key) == present:
            found.append(cast(Delta, delta))
    found.sort(key=lambda delta: not isinstance(delta, StandIn))
    return [delta if delta.strength == 1 else Part(delta) for delta in found]


def _sign(chain: Iterable[Delta], wholly: bool) -> Hashable:
    """Return what must be the same for all rows that go through a host together."""
    return tuple(map(id, chain)) if wholly else tuple(filter(None, map(_common, chain)))


def _common(delta: Delta) -> Hashable:
    match delta:
        case Enter():
            return (delta.table, len(delta.ids), delta.skip, delta.leave, delta.first, delta.room)
        case Leave() | Virtual(among="states"):
            return (type(delta), delta.tokens)
        case CachedKeys():
            return id(delta)
    return id(delta) if overrides(delta, "reweigh") else None


def _distinct(signs: Signs) -> Signs | None:
    return signs if len(set(signs.values())) > 1 else None
