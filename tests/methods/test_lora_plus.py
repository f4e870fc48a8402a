"""LoRA+: B has a learning rate of its own, in every kind of module."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_peft import PEFT, LoRA, inject
from lightning_peft.errors import ConfigError
from lightning_peft.methods import LoRAPlus
from tests.lightning_modules import Module, changed, loader, snapshot, trainer
from tests.test_module import made, rows

Build = Callable[[str], Any]


class Grouped(Module):
    """A module of a user who asks the adapter for its groups."""

    def configure_optimizers(self) -> Any:
        groups = self.peft_adapter.parameter_groups(self.lr, weight_decay=0.01)
        optimizer = torch.optim.AdamW(groups)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def rates(run: Any) -> dict[str, float]:
    adapter = run.lightning_module.peft_adapter
    names = {id(p): name.rpartition(".")[2] for name, p in adapter.named_parameters().items()}
    groups = run.optimizers[0].param_groups
    return {names[id(p)]: group["initial_lr"] for group in groups for p in group["params"]}


def test_starts_and_computes_as_lora(build: Build) -> None:
    outputs = []
    for method in (LoRA(), LoRAPlus()):
        example = build("bert")
        adapter = inject(example.model, method)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.normal_(std=0.1)
        outputs.append(example.logits())
    assert torch.equal(*outputs)


def test_groups_of_our_module_have_the_ratio(tmp_path: Path) -> None:
    module = made(methods=LoRAPlus(r=2, ratio=4.0), lr=0.01, head_lr=0.1)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, rows(), rows())
    assert rates(run) == {"lora_A": 0.01, "lora_B": 0.04, "weight": 0.1, "bias": 0.1}


def test_groups_of_a_users_module_have_the_ratio_and_follow_its_schedule(tmp_path: Path) -> None:
    run = trainer(tmp_path, PEFT(LoRAPlus(r=2, ratio=4.0)), max_epochs=2)
    run.fit(Grouped(lr=0.01), loader(), loader())
    assert rates(run) == {"lora_A": 0.01, "lora_B": 0.04}
    now = {group["lr"] for group in run.optimizers[0].param_groups}
    assert max(now) == pytest.approx(0.04 / 100)


def test_a_users_module_that_cannot_hold_the_ratio_is_refused_with_the_remedy(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match=r"16 times as fast.*peft_adapter\.parameter_groups"):
        trainer(tmp_path, PEFT(LoRAPlus(r=2))).fit(Module(), loader(), loader())


class OneCycle(Module):
    """A module of a user whose schedule has a peak of its own, for each group or for all."""

    each = False

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.peft_adapter.parameter_groups(self.lr))
        peaks = [group["lr"] for group in optimizer.param_groups]
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, peaks if self.each else self.lr, total_steps=20
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def test_a_schedule_that_levels_the_rates_is_refused_with_the_remedy(tmp_path: Path) -> None:
    module = OneCycle(lr=0.01)
    with pytest.raises(ConfigError, match=r"16 times as fast as .*lora_A.*max_lr=\[group\['lr'\]"):
        trainer(tmp_path, PEFT(LoRAPlus(r=2))).fit(module, loader(), loader())
    module = OneCycle(lr=0.01)
    module.each = True
    run = trainer(tmp_path, PEFT(LoRAPlus(r=2, ratio=4.0)))
    run.fit(module, loader(), loader())
    assert sorted({group["max_lr"] for group in run.optimizers[0].param_groups}) == [0.01, 0.04]


def test_it_resumes_exactly(tmp_path: Path) -> None:
    def run(path: Path | None = None) -> Any:
        module = Grouped(lr=0.01)
        torch.manual_seed(7 if path is None else 8)
        fit = trainer(tmp_path, PEFT(LoRAPlus(r=2)), max_epochs=2 if path else 1)
        fit.fit(module, loader(), loader(), ckpt_path=path)
        fit.save_checkpoint(tmp_path / f"{fit.current_epoch}.ckpt")
        return module

    run()
    resumed = run(tmp_path / "1.ckpt")
    whole = Grouped(lr=0.01)
    torch.manual_seed(7)
    trainer(tmp_path, PEFT(LoRAPlus(r=2)), max_epochs=2).fit(whole, loader(), loader())
    assert changed(snapshot(whole), resumed) == set()


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("inf")])
def test_a_ratio_out_of_range_is_refused(ratio: float) -> None:
    with pytest.raises(ConfigError, match="`ratio` must be positive, but is"):
        LoRAPlus(ratio=ratio)
