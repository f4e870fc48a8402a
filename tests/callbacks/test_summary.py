"""What the summary counts, and where it is printed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_peft import LoRA, inject
from lightning_peft.callbacks import TrainingSummary
from lightning_peft.callbacks.summary import parts, trained_size


def test_each_parameter_is_counted_once_in_its_part(tuned: LightningModule) -> None:
    found = {part.name: part for part in parts(tuned)}
    assert list(found) == ["base", "default_lora", "in place"]
    counts = {name: (part.trained, part.tensors, part.parameters) for name, part in found.items()}
    assert counts == {
        "base": (False, 2, 8 * 16 + 16),
        "default_lora": (True, 2, 2 * (8 + 16)),
        "in place": (True, 2, 16 * 2 + 2),
    }
    assert found["default_lora"].modules == ["body.0"]
    assert found["in place"].modules == ["head"]
    assert trained_size(tuned) == (48 + 34, 4 * (48 + 34))


def test_tied_weights_count_once_and_half_precision_takes_half_the_bytes() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8, bias=False), "b": nn.Linear(8, 8, bias=False)})
    model["b"].weight = model["a"].weight
    (base,) = parts(model.bfloat16().requires_grad_(False))
    assert (base.tensors, base.parameters, base.bytes) == (1, 64, 128)


def test_two_methods_and_two_adapters_have_a_row_each() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inject(model, LoRA(r=1, targets="0"), "first", head=False)
    inject(model, LoRA(r=1, targets="1"), "second", head=False)
    assert [part.name for part in parts(model)][-2:] == ["first_lora", "second_lora"]


def test_the_table_comes_before_the_first_step(
    tuned: LightningModule,
    batches: Any,
    make_trainer: Callable[..., Trainer],
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer = make_trainer(callbacks=[TrainingSummary()], enable_progress_bar=False, max_steps=0)
    trainer.fit(tuned, batches, batches)
    shown = capsys.readouterr().out
    sentence = " ".join(shown.split())
    lora = next(line for line in shown.splitlines() if "default_lora" in line)
    assert [cell.strip() for cell in lora.strip("│ ").split("│")] == [
        "default_lora",
        "trained",
        "2",
        "48",
        "21.24%",
        "192 B",
        "body.0",
    ]
    assert "weights 904 B + gradients 328 B + optimizer state 656 B = 1.9 kB" in sentence
    assert "activations come on top" in sentence
    assert "\x1b" not in shown


def test_many_modules_are_named_by_their_kinds(
    batches: Any, make_trainer: Callable[..., Trainer], capsys: pytest.CaptureFixture[str]
) -> None:
    class Deep(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)}) for _ in range(2)
            )
            inject(self, LoRA(r=1, targets=["*.up", "*.down"]), head=False)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            raise AssertionError("no step was asked for")

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    make_trainer(callbacks=[TrainingSummary()], enable_progress_bar=False, max_steps=0).fit(
        Deep(), batches
    )
    assert "4 modules: up, down" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (torch.optim.AdamW, 2),
        (lambda p: torch.optim.Adam(p, amsgrad=True), 3),
        (lambda p: torch.optim.SGD(p, lr=0.1), 0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 1),
    ],
)
def test_the_optimizers_state_is_what_the_optimizer_really_keeps(
    optimizer: Callable[..., torch.optim.Optimizer], expected: int
) -> None:
    from lightning_peft.callbacks.summary import _optimizer_bytes

    weight = nn.Parameter(torch.ones(16, 16))
    made = optimizer([weight])
    estimate = _optimizer_bytes(made)
    weight.grad = torch.ones_like(weight)
    made.step()
    kept = [v for v in made.state[weight].values() if torch.is_tensor(v) and v.shape == (16, 16)]
    assert estimate == sum(v.numel() * v.element_size() for v in kept) == expected * 1024


def test_an_unknown_optimizer_is_said_to_be_unknown(
    tuned: LightningModule,
    batches: Any,
    make_trainer: Callable[..., Trainer],
    capsys: pytest.CaptureFixture[str],
) -> None:
    tuned.configure_optimizers = lambda: torch.optim.Rprop(  # type: ignore[method-assign]
        [p for p in tuned.parameters() if p.requires_grad]
    )
    make_trainer(callbacks=[TrainingSummary()], enable_progress_bar=False, max_steps=0).fit(
        tuned, batches, batches
    )
    sentence = " ".join(capsys.readouterr().out.split())
    assert "optimizer state 0 B (unknown for this optimizer)" in sentence
