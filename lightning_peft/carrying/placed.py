"""Where an adapter's deltas are: in the slots of their hosts, acting or set aside."""

from typing import cast

from torch import nn

from lightning_peft.carrying.registry import modules_of
from lightning_peft.delta import SLOT, Delta, Slot, attach, detach, plain_name, slot_of


class Placed:
    """The deltas of one adapter, each in the slot of its host.

    Attributes:
        hosts: the host's plain name and the delta's name in its slot, in the order of attachment.
        slots: each slot with the delta's name there; behind those of the methods stand the slots
            of what was trained in place and has moved out of the model's own tensors.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.hosts: list[tuple[str, str]] = []
        self.slots: list[tuple[Slot, str]] = []

    def attach(self, host: str, key: str, delta: Delta) -> None:
        """Put a delta into the slot of a host, under a name of its own."""
        self.slots.append((attach(self.model.get_submodule(host), key, delta), key))
        self.hosts.append((plain_name(host), key))

    def detach(self) -> None:
        """Take all of them out of their hosts, the last one first."""
        modules = modules_of(self.model)
        for host, key in reversed(self.hosts):
            detach(modules[host], key)

    def let_act(self, active: bool) -> None:
        """Let all of them act, or none."""
        for slot, key in self.slots:
            slot.let_act(key, active)

    def forget_parked(self) -> None:
        """Leave out the slots of what was trained in place, which is there again."""
        del self.slots[len(self.hosts) :]

    def deltas(self) -> list[tuple[str, nn.Module, Delta]]:
        """Return the host's name, the host and the delta, in the order of attachment."""
        modules = modules_of(self.model)
        found = [(name, key, modules[name]) for name, key in self.hosts]
        return [(name, host, cast(Delta, slot_of(host)[key])) for name, key, host in found]

    def named(self, key: str) -> dict[str, Delta]:
        """Return the deltas that have this name in their slots, by the name of their host."""
        modules = modules_of(self.model)
        hosts = [host for host, own in self.hosts if own == key]
        return {host: cast(Delta, slot_of(modules[host])[key]) for host in hosts}

    def prefixes(self) -> list[str]:
        """Return what the names of each delta's tensors begin with, in the order of attachment."""
        return [f"{host}.{SLOT}.{key}.".lstrip(".") for host, key in self.hosts]
