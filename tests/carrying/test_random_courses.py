"""Whatever is done with several adapters, in whatever order, the model computes what it should.

Each course is a random sequence of what a user can do. Beside it runs a plain account of which
adapter has which values and which of them act, from which the outputs are computed by hand.
"""

import copy
import random
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import Adapter, LoRA, inject, load_adapter, mixed, switch
from lightning_peft.carrying.registry import carried
from lightning_peft.errors import AdapterError
from lightning_peft.methods import LNTuning

COURSES, STEPS = 40, 25
R, ALPHA, ROWS = 2, 16, 4

KINDS: tuple[dict[str, Any], ...] = (
    {"methods": LoRA(r=R, alpha=ALPHA, targets=["first", "second"]), "head": False},
    {"methods": LoRA(r=R, alpha=ALPHA, targets="first"), "head": True},
    {"methods": LoRA(r=R, alpha=ALPHA, targets="second", bias="lora"), "head": False},
    {"methods": LNTuning(), "head": False},
    {"methods": LNTuning(), "head": True},
    {"methods": [LoRA(r=R, alpha=ALPHA, targets="second"), LNTuning()], "head": True},
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.second, self.classifier = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.classifier(torch.tanh(self.second(self.norm(self.first(x)))))
        return hidden


@dataclass
class Entry:
    """What the account knows of an adapter."""

    adapter: Adapter
    found: dict[str, bool]
    """What acted before it came, and whether that was trainable."""
    active: bool = True
    trainable: bool = True
    scale: float = 1.0
    values: dict[str, Tensor] = field(default_factory=dict)

    def note(self) -> None:
        named = self.adapter.named_parameters()
        self.values = {name: p.detach().clone() for name, p in named.items()}

    def changes(self) -> dict[str, Tensor]:
        """Return the change of each weight."""
        downs = [name for name in self.values if name.endswith("lora_A")]
        strength = self.scale * ALPHA / R
        return {
            f"{name.split('.')[0]}.weight": strength
            * self.values[f"{name[:-1]}B"]
            @ self.values[name]
            for name in downs
        }


class Course:
    """A model, the account of it, and what can be done."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        torch.manual_seed(seed)
        self.model: nn.Module = Net().double().eval()
        self.merged: set[str] = set()
        self.base = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.x = torch.randn(ROWS, 6, dtype=torch.double)
        self.entries: dict[str, Entry] = {}
        self.count = 0
        self.steps: list[str] = []

    def active(self) -> list[str]:
        return [name for name, entry in self.entries.items() if entry.active]

    def expected(self, names: Collection[str], x: Tensor) -> Tensor:
        weights = {name: value.clone() for name, value in self.base.items()}
        acting = [entry for name, entry in self.entries.items() if name in names]
        for entry in acting:
            weights |= {n: entry.values[n].clone() for n in entry.adapter.in_place}
        for entry in acting:
            for name, change in entry.changes().items():
                weights[name] += change
        return torch.func.functional_call(Net().double(), weights, (x,))

    def clash(self, names: Sequence[str]) -> bool:
        own = [name for n in names for name in self.entries[n].adapter.in_place]
        return len(set(own)) < len(own)

    def check(self) -> None:
        with torch.no_grad():
            close(self.model(self.x), self.expected(self.active(), self.x))
        for entry in self.entries.values():
            own = entry.adapter
            assert (own.active, own.trainable) == (entry.active, entry.trainable)
            assert own.named_parameters().keys() == entry.values.keys()
            for name, parameter in own.named_parameters().items():
                assert torch.equal(parameter, entry.values[name])
                assert parameter.requires_grad == entry.trainable
        owned = {id(p) for entry in self.entries.values() for p in entry.adapter.parameters()}
        frozen = [p for p in self.model.parameters() if id(p) not in owned]
        assert not self.entries or not any(p.requires_grad for p in frozen)

    def came(self, adapter: Adapter) -> None:
        found = {name: self.entries[name].trainable for name in self.active()}
        for entry in self.entries.values():
            entry.active = entry.trainable = False
        self.entries[adapter.name] = Entry(adapter, found)
        self.entries[adapter.name].note()

    def some(self) -> str:
        return self.dice.choice(list(self.entries))

    def new_name(self) -> str:
        self.count += 1
        return f"a{self.count}"

    def inject(self) -> None:
        kind = self.dice.choice(KINDS)
        adapter = inject(self.model, name=self.new_name(), **kind)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        self.came(adapter)

    def save_and_load(self) -> None:
        entry = self.entries[self.some()]
        with tempfile.TemporaryDirectory() as folder:
            entry.adapter.save(folder)
            loaded = load_adapter(self.model, folder, self.new_name())
        self.came(loaded)
        values = self.entries[loaded.name].values
        for name, value in entry.values.items():
            new = name.replace(f".{entry.adapter.name}_", f".{loaded.name}_")
            assert torch.equal(values[new], value)

    def switch(self) -> None:
        names = [name for name in self.entries if self.dice.random() < 0.5]
        if self.clash(names):
            with pytest.raises(AdapterError, match="train"):
                switch(self.model, names)
            return
        switch(self.model, names)
        for name, entry in self.entries.items():
            entry.active = name in names

    def activate(self) -> None:
        name = self.some()
        entry = self.entries[name]
        if not entry.active and self.clash([name, *self.active()]):
            with pytest.raises(AdapterError, match="train"):
                entry.adapter.activate()
            return
        entry.adapter.activate()
        entry.active = True

    def deactivate(self) -> None:
        entry = self.entries[self.some()]
        entry.adapter.deactivate()
        entry.active = False

    def settle(self) -> None:
        entry = self.entries[self.some()]
        entry.adapter.settle()
        for other in [] if entry.active else self.entries.values():
            other.active = False
        entry.active = entry.trainable = True

    def freeze(self) -> None:
        entry, flag = self.entries[self.some()], self.dice.random() < 0.5
        entry.adapter.requires_grad_(flag)
        entry.trainable = flag

    def remove(self) -> None:
        entry = self.entries.pop(self.some())
        entry.adapter.remove()
        for name, trainable in entry.found.items() if entry.active and not self.active() else ():
            if name in self.entries:
                self.entries[name].active, self.entries[name].trainable = True, trainable

    def merge(self) -> None:
        name = self.some()
        entry = self.entries[name]
        try:
            entry.adapter.merge()
        except AdapterError:  # it does not act, or has its head elsewhere: nothing has happened
            return
        del self.entries[name]
        self.base |= {own: entry.values[own].clone() for own in entry.adapter.in_place}
        for weight, change in entry.changes().items():
            self.base[weight] += change
            self.merged.add(weight)

    def disable(self) -> None:
        name = self.some()
        with self.entries[name].adapter.disabled(), torch.no_grad():
            output = self.model(self.x)
        close(output, self.expected([n for n in self.active() if n != name], self.x))

    def mix(self) -> None:
        rows = [self.some_for_a_row() for _ in range(ROWS)]
        with mixed(self.model, rows), torch.no_grad():
            output = self.model(self.x)
        for row, (names, x) in enumerate(zip(rows, self.x, strict=True)):
            close(output[row], self.expected(names or (), x))

    def some_for_a_row(self) -> tuple[str, ...] | None:
        names = [name for name in self.entries if self.dice.random() < 0.35]
        return tuple(names[:1] if self.clash(names) else names) or None

    def train(self) -> None:
        entries = [e for e in self.entries.values() if e.active and e.trainable]
        if not entries:
            return
        optimizer = torch.optim.SGD([p for e in entries for p in e.adapter.parameters()], 0.02)
        self.model(self.x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for entry in entries:
            entry.note()

    def scale(self) -> None:
        entry, scale = self.entries[self.some()], self.dice.choice([-1.0, 0.0, 0.5, 2.0])
        methods = entry.adapter.methods
        if any(own for method in methods for own in method.in_place(self.model)):
            with pytest.raises(AdapterError, match="whose methods train weights in place"):
                entry.adapter.scale = scale
            return
        entry.adapter.scale = entry.scale = scale

    def copy(self) -> None:
        self.model = copy.deepcopy(self.model)
        for name, adapter in carried(self.model).items():
            self.entries[name].adapter = adapter

    def go(self) -> None:
        adding = [self.inject, self.inject, self.inject, self.save_and_load]
        using = [
            self.switch, self.switch, self.activate, self.deactivate, self.settle, self.settle,
            self.freeze, self.remove, self.merge, self.disable, self.mix, self.mix, self.train,
            self.train, self.scale, self.copy,
        ]  # fmt: skip
        choices: list[Callable[[], None]] = using if self.entries else [self.inject]
        choices = choices + adding if 0 < len(self.entries) < 4 else choices
        step = self.dice.choice(choices)
        self.steps.append(step.__name__)
        step()
        self.check()


def close(output: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)


def exactly(value: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(value, expected, rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(COURSES))
def test_the_outputs_are_those_of_what_acts_after_every_step(seed: int) -> None:
    course = Course(seed)
    for _ in range(STEPS):
        try:
            course.go()
        except AssertionError as error:
            raise AssertionError(f"after {', '.join(course.steps)}: {error}") from error
    for name in list(course.entries):
        course.entries.pop(name).adapter.remove()
    for own, parameter in course.model.named_parameters():
        # What was merged was added up here too, and rounds otherwise on some processors.
        same = close if own in course.merged else exactly
        same(parameter, course.base[own])
    assert type(course.model) is Net
    assert list(course.model.state_dict()) == list(course.base)
