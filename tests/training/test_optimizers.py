"""Optimizers hold exactly what is trained, in whatever form they are handed over."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from lightning_peft.errors import ConfigError
from lightning_peft.training.optimizers import group_names, keep_trainable, optimizers_in


@pytest.fixture
def named() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.ones(2)) for name in ("b", "frozen", "a", "c")}


@pytest.fixture
def trained(named: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    return {name: p for name, p in named.items() if name != "frozen"}


def test_frozen_parameters_leave_and_the_others_are_sorted(
    named: dict[str, nn.Parameter], trained: dict[str, nn.Parameter]
) -> None:
    optimizer = SGD(named.values(), lr=0.1)
    keep_trainable(optimizer, trained)
    assert group_names(optimizer, trained) == [["a", "b", "c"]]


def test_groups_keep_their_settings_and_what_no_group_holds_joins_the_first(
    named: dict[str, nn.Parameter], trained: dict[str, nn.Parameter]
) -> None:
    groups = [{"params": [named["c"]], "lr": 1.0}, {"params": [named["frozen"], named["a"]]}]
    optimizer = SGD(groups, lr=0.1)
    keep_trainable(optimizer, trained)
    assert group_names(optimizer, trained) == [["b", "c"], ["a"]]
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.1]


def test_equal_values_are_not_taken_for_the_same_parameter(
    named: dict[str, nn.Parameter],
) -> None:
    optimizer = SGD(named.values(), lr=0.1)
    keep_trainable(optimizer, {"a": named["a"]})
    assert optimizer.param_groups[0]["params"][0] is named["a"]
    assert len(optimizer.param_groups[0]["params"]) == 1


def test_named_parameters_are_dropped_together_with_their_names(
    named: dict[str, nn.Parameter], trained: dict[str, nn.Parameter]
) -> None:
    optimizer = AdamW(named.items(), lr=0.1)
    keep_trainable(optimizer, trained)
    for parameter in trained.values():
        parameter.grad = torch.ones(2)
    optimizer.step()
    again = AdamW(trained.values(), lr=0.1)
    keep_trainable(again, trained)
    again.load_state_dict(optimizer.state_dict())
    assert group_names(again, trained) == [["a", "b", "c"]]


def test_lbfgs_steps_what_is_trained(
    named: dict[str, nn.Parameter], trained: dict[str, nn.Parameter]
) -> None:
    optimizer = torch.optim.LBFGS([named["frozen"]], lr=0.1)
    keep_trainable(optimizer, trained)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in named.values())
        loss.backward()
        return loss

    optimizer.step(closure)
    assert all((p < 1).all() for p in trained.values())
    assert torch.equal(named["frozen"], torch.ones(2))


def test_two_optimizers_may_share_a_parameter_but_none_may_be_left_out(
    named: dict[str, nn.Parameter], trained: dict[str, nn.Parameter]
) -> None:
    both = [SGD([named["a"], named["b"]], lr=0.1), SGD([named["b"], named["c"]], lr=0.2)]
    keep_trainable(both, trained)
    assert [group_names(o, trained) for o in both] == [[["a", "b"]], [["b", "c"]]]
    with pytest.raises(ConfigError, match="`c` is trained, but no optimizer"):
        keep_trainable([both[0], SGD([named["frozen"]], lr=0.1)], trained)


def test_an_optimizer_with_a_state_from_the_start_forgets_the_frozen(
    named: dict[str, nn.Parameter], trained: dict[str, nn.Parameter]
) -> None:
    optimizer = Adagrad(named.values(), lr=0.1)
    keep_trainable(optimizer, trained)
    assert len(optimizer.state_dict()["state"]) == 3
    late = Adagrad([named["frozen"]], lr=0.1)
    with pytest.raises(ConfigError, match="`a` is trained, but no optimizer"):
        keep_trainable(late, trained)


def _plateau(optimizer: Any) -> dict[str, Any]:
    return {"scheduler": ReduceLROnPlateau(optimizer), "monitor": "val/loss"}


@pytest.mark.parametrize(
    "form",
    [
        lambda o: o,
        lambda o: [o],
        lambda o: (o,),
        lambda o: ([o], [StepLR(o, 1)]),
        lambda o: ([o], [{"scheduler": StepLR(o, 1), "interval": "step"}]),
        lambda o: {"optimizer": o},
        lambda o: {"optimizer": o, "lr_scheduler": StepLR(o, 1)},
        lambda o: {"optimizer": o, "lr_scheduler": _plateau(o)},
        lambda o: [{"optimizer": o, "lr_scheduler": StepLR(o, 1)}],
        lambda o: ({"optimizer": o}, {"optimizer": o}),
    ],
)
def test_every_form_that_lightning_takes_is_read(
    form: Callable[[Any], Any], named: dict[str, nn.Parameter], trained: dict[str, nn.Parameter]
) -> None:
    optimizer = SGD(named.values(), lr=0.1)
    configured = form(optimizer)
    keep_trainable(configured, trained)
    assert optimizers_in(configured) == [optimizer]
    assert group_names(optimizer, trained) == [["a", "b", "c"]]


def test_no_optimizer_is_fine(trained: dict[str, nn.Parameter]) -> None:
    keep_trainable(None, trained)
    assert optimizers_in(None) == []
