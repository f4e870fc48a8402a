"""Putting mixtures in the place of the deltas of a model, and the deltas back.

While a batch is mixed, each host's slot runs one `Mixture` of what its adapters have there. What an
adapter has in the model's own tensors (a head) stays where it is, so that an optimizer made before
keeps its parameters: the rows of the others read the base's values through `StandIn`s instead.
"""

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

from torch import Tensor, nn

from lightning_peft.adapter import Adapter
from lightning_peft.carrying.registry import Forgetful, Registry, modules_of
from lightning_peft.delta import SLOT, Delta, Slot, attach, detach, only, slot_of
from lightning_peft.deltas.cached_keys import CachedKeys
from lightning_peft.deltas.mixed import APART, Apart, Batch, Mixture, Parting, overrides
from lightning_peft.deltas.ragged import reaching
from lightning_peft.deltas.virtual_tokens import Enter, Leave, Virtual
from lightning_peft.marker import subclass, without
from lightning_peft.merging.scaling import Part
from lightning_peft.ops.rows import Key, Plan
from lightning_peft.structure import anatomy, batch

Signs = Mapping[Key, Hashable]

Owners = dict[tuple[int, str], str]
"""The adapter of a delta, by its slot and its name there."""


class StandIn(Delta):
    """The base's values of tensors in whose place an adapter has its own."""

    def __init__(self, tensors: Mapping[str, Tensor], adapter: str) -> None:
        super().__init__()
        self.__dict__["tensors"] = dict(tensors)  # of no state dict
        self.active, self.adapter = False, adapter

    def reweigh(self, host: nn.Module, name: str, weight: Tensor) -> Tensor:
        """Return the base's tensor."""
        tensors: dict[str, Tensor] = self.__dict__["tensors"]
        return tensors.get(name, weight)


class Scene:
    """What acts on a model whose rows have certain adapters, whichever row has which.

    Args:
        model: which carries the adapters.
        present: its adapters.
        keys: what the rows have.
    """

    def __init__(self, model: nn.Module, present: Registry, keys: Collection[Key]) -> None:
        self.model, self.present, self.keys = model, present, keys
        self.batch = Batch()
        self.stand_ins: list[tuple[nn.Module, str, StandIn]] = []
        self.running: list[tuple[nn.Module, list[Delta]]] = []
        self.partings: list[tuple[nn.Module, Parting]] = []
        self.stacked: set[tuple[Key, ...]] = set()
        modules = modules_of(model)
        owners = self._owners(modules)
        with self._stood_in():
            self._fill(modules, owners)

    @contextmanager
    def entered(self, plan: Plan) -> Iterator[None]:
        """Within this context the rows of `plan` act."""
        outer, self.batch.plan = self.batch.plan, plan
        for keys in self.stacked:
            plan.places(keys)  # a compiler would take for constant what it saw being made
        with ExitStack() as stack:
            stack.callback(setattr, self.batch, "plan", outer)
            stack.enter_context(self._stood_in())
            for host, running in self.running:
                slot = slot_of(host)
                stack.callback(_let_run, slot, slot.running)
                slot.running = running
            around, self.present.entered = self.present.entered, self
            stack.callback(setattr, self.present, "entered", around)
            for module, parting in [] if around is None else around.partings:
                stack.callback(_part, module, parting)
                _unite(module)
            for module, parting in self.partings:
                stack.callback(_unite, module)
                _part(module, parting)
            yield

    def _fill(self, modules: Mapping[str, nn.Module], owners: Owners) -> None:
        rowless, read = self._rowless(), anatomy.read_by_parents(self.model)
        partings: dict[str, list[Signs]] = {}
        mixtures: dict[str, Mixture] = {}
        for name, host in _hosts(modules).items():
            slot = slot_of(host)
            chains = reaching({key: _chain(slot, owners, key) for key in self.keys})
            self.running.append((host, []))
            if not any(chains.values()):
                continue
            signs = _distinct({k: _sign(chain, name in rowless) for k, chain in chains.items()})
            outside = name in read or anatomy.is_uncalled(host)
            place = name.rpartition(".")[0] if outside else name
            place = rowless.get(place, place)
            mixtures[name] = Mixture(name, self.batch, chains, signs, place == name)
            self.running[-1][1].append(mixtures[name])
            if (stack := mixtures[name].stack) is not None:
                self.stacked.add(stack.keys)
            partings.setdefault(place, []).extend([signs] if signs else [])
        for name, found in partings.items():
            if found:
                signs = {key: tuple(signs[key] for signs in found) for key in self.keys}
                parting = Parting(name, self.batch, signs, mixtures.get(name), self._trained(name))
                self.partings.append((modules[name], parting))

    def _owners(self, modules: Mapping[str, nn.Module]) -> Owners:
        """Return whose each delta is, and make the base's stand-ins."""
        owners: Owners = {}
        for adapter in self.present.values():
            owners |= {(id(slot), name): adapter.name for slot, name in adapter.placed()}
            for owner, tensors in adapter.replaced("mixed()").items():
                host, key = modules[owner], f"{adapter.name}_base"
                self.stand_ins.append((host, key, StandIn(tensors, adapter.name)))
        return owners

    @contextmanager
    def _stood_in(self) -> Iterator[None]:
        added = []
        try:
            for host, key, stand_in in self.stand_ins:
                if SLOT not in host._modules or key not in slot_of(host):
                    attach(host, key, stand_in)
                    added.append((host, key))
            yield
        finally:
            for host, key in reversed(added):
                detach(host, key)

    def _rowless(self) -> Mapping[str, str]:
        if self.present.rowless is None:
            with only(self.model):
                self.present.rowless = batch.rowless(self.model)
        return self.present.rowless

    def _trained(self, name: str) -> list[Key]:
        """Return the keys of which an adapter trains a module in place."""
        owners = {
            n: {own.rpartition(".")[0] for own in a.in_place} for n, a in self.present.items()
        }
        return [key for key in self.keys if any(name in owners[adapter] for adapter in key)]


def scene_of(model: nn.Module, present: Registry, keys: Collection[Key]) -> Scene:
    """Return what acts on rows with `keys`, made once as long as the adapters stay as they are."""
    state = next((p.device for p in model.parameters()), None), *map(_state, present.values())
    kept: Scene | None
    made_at, kept = present.scenes.get(frozenset(keys), (None, None))
    if kept is None or made_at != state:
        kept = Scene(model, present, sorted(keys))
        present.scenes = Forgetful({frozenset(keys): (state, kept)})
    return kept


def _state(adapter: Adapter) -> tuple[Any, ...]:
    placed = adapter.placed()
    strength = next((slot[name].strength for slot, name in placed), 1.0)
    settled = bool(adapter.in_place) and adapter.active
    return adapter, settled, adapter.is_disabled, len(placed), strength


def _let_run(slot: Slot, running: list[Delta]) -> None:
    if any(isinstance(delta, Mixture) for delta in running):
        slot.running = running  # this context lies in another one
    else:
        slot.refresh()


def _part(module: nn.Module, parting: Parting) -> None:
    module.__class__ = subclass(cast(type, type(module)), Apart)
    module.__dict__[APART] = parting


def _unite(module: nn.Module) -> None:
    del module.__dict__[APART]
    module.__class__ = without(type(module), Apart)


def _hosts(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the modules with deltas, each under one name."""
    names = {id(m): name for name, m in reversed([*modules.items()]) if SLOT in m._modules}
    return {name: modules[name] for name in names.values()}


def _chain(slot: Slot, owners: Owners, key: Key) -> list[Delta]:
    """Return what acts on the rows of a key, the base's own values first."""
    found = []
    for name, delta in slot.items():
        if isinstance(delta, StandIn):
            acting = delta.adapter not in key
        else:
            acting = owners.get((id(slot), name)) in key
        if acting:
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
