"""Changes as dense as the weight: a linear layer of full precision reads the sum of both."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from lightning_peft import inject
from lightning_peft.adapter import Adapter
from lightning_peft.delta import Summing
from lightning_peft.method import Method
from lightning_peft.methods.fourierft import FourierFT
from lightning_peft.methods.hira import HiRA
from lightning_peft.methods.shira import SHiRA

METHODS: dict[str, Method] = {
    "shira": SHiRA(r=1),
    "fourierft": FourierFT(frequencies=7),
    "hira": HiRA(r=2),
}
every = pytest.mark.parametrize("method", METHODS)


class Products(TorchDispatchMode):
    """Counts the products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count[function.overloadpacket.__name__] += 1
        return function(*args, **kwargs or {})

    @property
    def total(self) -> int:
        return sum(self.count[name] for name in ("mm", "addmm", "linear"))


def tuned(method: str, layer: nn.Module | None = None) -> tuple[nn.Sequential, Adapter]:
    """Return a layer behind another, so that its input has a gradient, and a changed adapter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), layer or nn.Linear(8, 6))
    adapter = inject(model, [METHODS[method]], head=False)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.3)
    return model, adapter


@every
def test_a_step_takes_three_products_a_layer(method: str) -> None:
    model, _ = tuned(method)
    x = torch.randn(4, 8, requires_grad=True)
    small = 6 if method == "hira" else 0  # B A of two layers, forward and backward
    with Products() as products:
        model(x).sum().backward()
    assert products.total == 2 * 3 + small


@every
def test_the_weight_stays_the_parameter_outside_its_layers_forward_pass(method: str) -> None:
    model, adapter = tuned(method)
    layer = model[1]
    before = copy.deepcopy(layer.state_dict())
    model(torch.randn(4, 8))
    assert layer.weight is layer._parameters["weight"]
    assert torch.equal(layer.weight, before["weight"])
    adapter.remove()
    assert type(layer) is nn.Linear
    assert not isinstance(layer, Summing)


@every
def test_a_failed_forward_pass_leaves_nothing_behind(method: str) -> None:
    model, _ = tuned(method)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model[1](torch.randn(4, 3))
    assert model[1].weight is model[1]._parameters["weight"]


@every
@pytest.mark.parametrize("precision", ["half", "autocast"])
def test_a_small_change_of_half_precision_is_added_to_the_output(
    method: str, precision: str
) -> None:
    """Beside a weight a thousand times as large the change would be rounded away in the sum."""
    model, adapter = tuned(method)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(0.01)
    x = torch.randn(4, 8)

    def run() -> Tensor:
        if precision == "half":
            layer = model[1].bfloat16()
            return layer(x.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            return model[1](x)

    with Products() as products:
        run()
    assert products.total >= 2


@every
def test_another_kind_of_linear_layer_adds_to_the_output(method: str) -> None:
    model, adapter = tuned(method, Conv1D(6, 8))
    assert not isinstance(model[1], Summing)
    x = torch.randn(4, 8)
    delta: Any = next(delta for host, _, delta in adapter.deltas if host == "1")
    with adapter.disabled():
        base = model[1](x)
    torch.testing.assert_close(model[1](x), base + x @ delta.change(model[1].weight.T).T)


def test_two_changes_of_one_layer_add_up_whatever_their_order() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6)).double()
    x = torch.randn(4, 8, dtype=torch.double)
    adapter = inject(model, [SHiRA(r=1), HiRA(r=2)], head=False)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    layer = model[1]
    changes = [delta.change(layer.weight) for host, _, delta in adapter.deltas if host == "1"]  # type: ignore[operator]
    expected = nn.functional.linear(x, layer.weight + sum(changes), layer.bias)
    torch.testing.assert_close(layer(x), expected)


@every
def test_a_compiled_model_computes_the_same(method: str) -> None:
    model, _ = tuned(method)
    x = torch.randn(4, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


@every
def test_runs_on_the_meta_device(method: str) -> None:
    model, _ = tuned(method)
    assert model.to("meta")(torch.empty(4, 8, device="meta")).shape == (4, 6)
