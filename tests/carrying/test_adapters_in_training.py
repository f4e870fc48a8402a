"""An adapter trains under a Trainer beside others that the model carries."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from lightning_peft import PEFT, Adapter, LoRA, inject, load_adapter, switch
from lightning_peft.errors import AdapterError
from tests.lightning_modules import At, Module, loader, trainer


def values(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in adapter.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())


def trained_alone(folder: Path) -> dict[str, torch.Tensor]:
    seed_everything(1)
    module = Module()
    trainer(folder, PEFT(LoRA(r=2), "mine")).fit(module, loader(), loader())
    return values(module.peft_adapter)  # type: ignore[operator]


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
@pytest.mark.parametrize("ema", [False, True])
def test_training_is_what_it_would_be_alone_and_leaves_others_alone(
    ema: bool, tmp_path: Path
) -> None:
    alone = trained_alone(tmp_path)
    module: Any = Module()
    other = inject(module, LoRA(r=3), "other")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    before, base = values(other), {n: p for n, p in module.state_dict().items() if "peft" not in n}
    seed_everything(1)
    averages = [EMAWeightAveraging()] if ema else []
    trainer(tmp_path, PEFT(LoRA(r=2), "mine"), *averages).fit(module, loader(), loader())
    assert same(values(other), before)
    assert not other.active
    if not ema:
        assert same(values(module.peft_adapter), alone)
    module.peft_adapter.remove()
    switch(module, ())
    after = module.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in base.items() if name in after)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_checkpoint_holds_the_trained_one_alone_and_resumes(tmp_path: Path) -> None:
    def beside(folder: str, epochs: int, path: str | None = None) -> Any:
        seed_everything(1)
        module: Any = Module()
        inject(module, LoRA(r=3), "other")
        keep = ModelCheckpoint(tmp_path / folder, save_last=True)
        settings = {"max_epochs": epochs, "enable_checkpointing": True}
        run = trainer(tmp_path, PEFT(LoRA(r=2), "mine"), keep, **settings)
        run.fit(module, loader(), loader(), ckpt_path=path)
        return module

    whole = beside("whole", 2)
    beside("first", 1)
    saved = torch.load(tmp_path / "first" / "last.ckpt", weights_only=True)
    resumed = beside("first", 2, str(tmp_path / "first" / "last.ckpt"))
    assert same(values(whole.peft_adapter), values(resumed.peft_adapter))
    assert not [name for name in saved["state_dict"] if "other" in name]


def test_an_adapter_that_was_displaced_trains_on(tmp_path: Path) -> None:
    module: Any = Module()
    run = trainer(tmp_path, PEFT(LoRA(r=2), "mine"))
    run.fit(module, loader(), loader())
    mine = module.peft_adapter
    other = inject(module, LoRA(r=3), "other")
    assert (mine.active, other.active) == (False, True)
    before, theirs = values(mine), values(other)
    trainer(tmp_path, PEFT(LoRA(r=2), "mine")).fit(module, loader(), loader())
    assert (mine.active, mine.trainable, other.active) == (True, True, False)
    assert same(values(other), theirs)
    assert not same(values(mine), before)


def test_folders_with_a_head_each_are_carried_together(tmp_path: Path) -> None:
    batch, outputs, module = next(iter(loader()))[0], {}, Module().eval()
    for name in ("a", "b"):
        adapter = inject(module, LoRA(r=2), name)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(0.05 if name == "a" else -0.05)
        outputs[name] = module(batch)
        adapter.save(tmp_path / name)
        adapter.remove()
    outputs["base"] = module(batch)
    for name in ("a", "b"):
        load_adapter(module, tmp_path / name)
    for name in ("a", "b", "a"):
        switch(module, name)
        assert torch.equal(module(batch), outputs[name])
    switch(module, ())
    assert torch.equal(module(batch), outputs["base"])


def test_a_fit_trains_a_saved_adapter_further(tmp_path: Path) -> None:
    first: Any = Module()
    trainer(tmp_path, PEFT(LoRA(r=2), "mine")).fit(first, loader(), loader())
    folder = first.peft_adapter.save(tmp_path / "mine")
    second: Any = Module()
    start: list[Any] = []
    look = At("on_train_start", lambda *_: start.append(values(second.peft_adapter)))
    further = PEFT(LoRA(r=2), "mine", beside={"mine": str(folder)})
    trainer(tmp_path, further, look).fit(second, loader(), loader())
    assert same(start[0], values(first.peft_adapter))
    assert not same(values(second.peft_adapter), start[0])
    other = PEFT(LoRA(r=3), "mine", beside={"mine": str(folder)})
    with pytest.raises(AdapterError, match="not what is asked for"):
        trainer(tmp_path, other).fit(Module(), loader(), loader())
