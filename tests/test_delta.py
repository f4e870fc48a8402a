"""The mechanism: hook, marker class, slot."""

import copy
import pickle
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lightning_peft.delta import (
    SLOT,
    Delta,
    NotMergeable,
    attach,
    detach,
    plain_name,
    slot_of,
)
from lightning_peft.errors import AdapterError
from lightning_peft.marker import subclass
from lightning_peft.training.modes import hold_in_eval, release


class Add(Delta):
    """Adds a number to the output, and another one to the first input."""

    def __init__(self, after: float, before: float = 0.0) -> None:
        super().__init__()
        self.after, self.shift = nn.Parameter(torch.tensor(after)), before
        self.register_buffer("calls", torch.zeros(()))

    def before(self, host: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (args[0] + self.shift, *args[1:]), kwargs
        return args, {name: value + self.shift for name, value in kwargs.items()}

    def forward(self, host: Any, args: Any, kwargs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] + self.after, *output[1:])
        return output + self.after


class Double(Delta):
    def forward(self, host: Any, args: Any, kwargs: Any, output: Any) -> Any:
        return 2 * output


class Reverse(Delta):
    """Reverses the order of the host's outputs, in its weight alone."""

    def reweigh(self, host: Any, name: str, weight: Tensor) -> Tensor:
        return weight.flip(0) if name == "weight" else weight


class Identity(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return x, "note"


class Registered(nn.Linear):
    """A user's class that counts its subclasses and asks each for a word."""

    known: ClassVar[list[str]] = []

    def __init_subclass__(cls, *, word: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Registered.known.append(word)


def test_changes_inputs_and_outputs_in_order_of_attachment() -> None:
    host, x = Identity(), torch.ones(2)
    attach(host, "add", Add(1.0))
    attach(host, "twice", Double())
    attach(host, "shift", Add(0.0, before=10.0))
    assert host(x).tolist() == [24.0, 24.0]
    assert host(x=x).tolist() == [24.0, 24.0]
    slot_of(host).let_act("twice", False)
    assert host(x).tolist() == [12.0, 12.0]


def test_a_tuple_passes_through_the_delta_whole() -> None:
    host = Pair()
    attach(host, "add", Add(1.0))
    output, note = host(torch.ones(1))
    assert (output.item(), note) == (2.0, "note")


def test_detach_leaves_hooks_of_the_user() -> None:
    host = nn.Linear(2, 2)
    seen: list[str] = []
    first = host.register_forward_hook(lambda *_: seen.append("first"))
    host.register_forward_pre_hook(lambda *_: seen.append("before"))
    attach(host, "one", Add(1.0, before=1.0))
    attach(host, "two", Add(1.0, before=1.0))
    later = host.register_forward_hook(lambda *_: seen.append("later"))
    detach(host, "one")
    assert list(slot_of(host)) == ["two"]
    detach(host, "two")
    assert type(host) is nn.Linear
    assert SLOT not in host._modules
    host(torch.ones(1, 2))
    assert seen == ["before", "first", "later"]
    first.remove()
    later.remove()
    assert not host._forward_hooks
    assert not host._forward_hooks_with_kwargs


def test_an_attached_module_is_of_its_own_class() -> None:
    host = nn.Linear(2, 2)
    attach(host, "add", Add(1.0))
    assert isinstance(host, nn.Linear)
    assert type(host) is not nn.Linear
    assert type(host) is subclass(nn.Linear)
    assert type(host).__name__ == "Linear"
    assert type(host).__qualname__ == nn.Linear.__qualname__
    assert type(host).__doc__ == nn.Linear.__doc__


def test_a_name_is_carried_once() -> None:
    host = nn.Linear(2, 2)
    attach(host, "add", Add(1.0))
    with pytest.raises(AdapterError, match="already carries a delta `add`"):
        attach(host, "add", Add(1.0))


@pytest.mark.parametrize("host", [nn.Sequential(nn.ReLU()), nn.ModuleList(), nn.ModuleDict()])
def test_containers_are_refused(host: nn.Module) -> None:
    with pytest.raises(AdapterError, match="name one of its children"):
        attach(host, "add", Add(1.0))
    assert SLOT not in host._modules
    assert not host._forward_hooks


def test_a_class_that_looks_after_its_subclasses_is_left_in_peace() -> None:
    host, known = Registered(2, 2), list(Registered.known)
    attach(host, "add", Add(1.0))
    assert isinstance(host, Registered)
    assert Registered.known == known


def test_copies_and_pickles_carry_the_delta() -> None:
    host, x = Identity(), torch.ones(1)
    attach(host, "add", Add(1.0, before=1.0))
    for twin in (copy.deepcopy(host), pickle.loads(pickle.dumps(host))):
        assert type(twin) is type(host)
        assert twin(x).item() == 3.0
        detach(twin, "add")
        assert type(twin) is Identity
        assert twin(x).item() == 1.0
    assert host(x).item() == 3.0


def test_a_shallow_copy_works() -> None:
    host = nn.Linear(2, 2)
    attach(host, "add", Add(1.0))
    assert torch.equal(copy.copy(host)(torch.ones(1, 2)), host(torch.ones(1, 2)))


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16])
def test_a_cast_narrows_the_host_but_not_the_delta(cast: Any) -> None:
    host = nn.Linear(2, 2)
    attach(host, "add", Add(1.1))
    value, before = slot_of(host)["add"].after, slot_of(host)["add"].after.clone()
    cast(host)
    assert host.weight.dtype in (torch.float16, torch.bfloat16)
    assert slot_of(host)["add"].after is value
    assert torch.equal(value, before)
    assert slot_of(host)["add"].calls.dtype == torch.float32
    host.double()
    assert slot_of(host)["add"].after.dtype == torch.float64


def test_a_move_to_another_device_moves_the_delta_in_full_precision() -> None:
    host = nn.Linear(2, 2)
    attach(host, "add", Add(1.0))
    host.to("meta", torch.bfloat16)
    assert host.weight.dtype == torch.bfloat16
    assert slot_of(host)["add"].after.device.type == "meta"
    assert slot_of(host)["add"].after.dtype == torch.float32


def test_what_cannot_be_merged_says_so() -> None:
    with pytest.raises(NotMergeable, match="`Double` cannot be merged into Linear"):
        Double().merge(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("_orig_mod.layer.weight", "layer.weight"),
        ("a._fsdp_wrapped_module.b._checkpoint_wrapped_module.weight", "a.b.weight"),
        ("weight", "weight"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
    ],
)
def test_plain_name(name: str, plain: str) -> None:
    assert plain_name(name) == plain


def test_a_held_norm_stays_in_eval_until_it_is_released() -> None:
    norm = nn.BatchNorm1d(2)
    held = hold_in_eval(norm)
    nn.Sequential(norm).train()
    assert not norm.training
    assert copy.deepcopy(norm).train().training is False
    release(held)
    assert type(norm) is nn.BatchNorm1d
    assert norm.training


def test_a_weight_is_read_through_its_deltas_and_stays_what_it_is() -> None:
    torch.compiler.reset()
    host, x = nn.Linear(3, 4), torch.randn(2, 3)
    plain = copy.deepcopy(host)
    attach(host, "add", Add(0.0))
    attach(host, "reverse", Reverse())
    wanted = plain.weight.flip(0)
    assert torch.equal(host.weight, wanted)
    assert torch.equal(dict(host.named_parameters())["weight"], plain.weight)
    assert torch.equal(host.state_dict()["weight"], plain.weight)
    for twin in (host, copy.deepcopy(host), pickle.loads(pickle.dumps(host))):
        torch.testing.assert_close(twin(x), x @ wanted.T + plain.bias)
    compiled = torch.compile(host, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), x @ wanted.T + plain.bias)
    slot_of(host).let_act("reverse", False)
    assert torch.equal(host.weight, plain.weight)
    torch.testing.assert_close(compiled(x), plain(x))
    detach(host, "add")
    detach(host, "reverse")
    assert type(host) is nn.Linear
    assert torch.equal(host(x), plain(x))


@pytest.mark.parametrize("training", [True, False])
def test_a_delta_is_in_the_mode_of_its_host(training: bool) -> None:
    host = Identity().train(training)
    attach(host, "add", Add(1.0))
    assert slot_of(host)["add"].training is training
