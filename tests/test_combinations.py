"""Several methods in one adapter: trained, saved, loaded and taken out as one."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_peft import (
    BottleneckAdapter,
    LoRA,
    PEFTModule,
    PrefixTuning,
    PromptTuning,
    inject,
    load_adapter,
)
from lightning_peft.carrying.registry import adapters_of
from lightning_peft.delta import NotMergeable, slot_of
from lightning_peft.errors import AdapterError, ConfigError
from lightning_peft.methods import IA3, DoRA, LoRAPlus
from lightning_peft.tasks.sequence_classification import SequenceClassification
from tests.lightning_modules import At, changed, snapshot, trainer

Build = Callable[[str], Any]

MIXES = {
    "lora, prefix, bottleneck": (LoRA(), PrefixTuning(tokens=4), BottleneckAdapter()),
    "prompt, prefix, lora": (PromptTuning(tokens=4), PrefixTuning(tokens=4), LoRA()),
}


@pytest.mark.parametrize("mix", MIXES.values(), ids=list(MIXES))
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_a_mix_is_one_adapter(
    mix: tuple[Any, ...], name: str, build: Build, tmp_path: Path
) -> None:
    example = build(name)
    pristine = copy.deepcopy(example.model)
    base = example.logits()
    adapter = inject(example.model, mix)
    first = {n: p.detach().clone() for n, p in adapter.named_parameters().items()}
    example.model.train()
    example.train(adapter.parameters())
    example.model.eval()
    moved = adapter.named_parameters()
    for method in mix:
        own = [n for n in moved if f".default_{method.kind}." in f".{n}"]
        assert own
        assert all(not torch.equal(moved[n], first[n]) for n in own)
    tuned = example.logits()
    other = build(name)
    loaded = load_adapter(other.model, adapter.save(tmp_path / "adapter"))
    assert torch.equal(other.logits(), tuned)
    assert [type(method) for method in loaded.methods] == [type(method) for method in mix]
    with adapter.disabled():
        assert torch.equal(example.logits(), base)
    adapter.remove()
    assert torch.equal(example.logits(), base)
    assert list(example.model.state_dict()) == list(pristine.state_dict())


def test_the_order_of_the_list_is_the_order_of_the_changes(build: Build) -> None:
    example = build("llama")
    adapter = inject(example.model, [BottleneckAdapter(), LoRA()])
    example.train(adapter.parameters())
    twin = build("llama")
    swapped = inject(twin.model, [LoRA(), BottleneckAdapter()])
    swapped.load_state_dict(adapter.state_dict())
    assert not torch.equal(example.logits(), twin.logits())


def rows(shuffle: bool = False) -> DataLoader[Any]:
    ids = torch.randint(3, 64, (12, 7), generator=torch.Generator().manual_seed(3))
    texts = [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]
    return DataLoader([t | {"labels": i % 3} for i, t in enumerate(texts)], 4, shuffle=shuffle)


def test_a_mix_resumes_exactly(build: Build, tmp_path: Path) -> None:
    mix = (LoRA(dropout=0.2), PrefixTuning(tokens=4, bottleneck=8), BottleneckAdapter(dropout=0.1))
    task = SequenceClassification(labels=["a", "b", "c"])
    save = At(
        "on_train_epoch_end",
        lambda run, _: run.save_checkpoint(f"{tmp_path}/{run.current_epoch}.ckpt"),
    )

    def run(path: Path | None = None) -> PEFTModule:
        module = PEFTModule(build("bert").model.train(), mix, task)
        torch.manual_seed(7 if path is None else 8)
        trainer(tmp_path, save, max_epochs=3).fit(
            module, rows(shuffle=True), rows(), ckpt_path=path
        )
        return module

    whole = snapshot(run())
    assert changed(whole, run(tmp_path / "0.ckpt")) == set()


@pytest.mark.parametrize("mix", [(LoRA(), DoRA()), (IA3(), LoRA())], ids=["dora", "ia3"])
def test_changes_that_build_on_each_other_are_not_folded_in(
    mix: tuple[Any, ...], build: Build
) -> None:
    together, beside = build("llama"), build("llama")
    both = inject(together.model, mix)
    alone = [inject(beside.model, method, f"a{i}", head=False) for i, method in enumerate(mix)]
    alone[0].activate()
    for example, adapters in ((together, [both]), (beside, alone)):
        with torch.no_grad():
            for parameter in [p for adapter in adapters for p in adapter.parameters()]:
                parameter.add_(0.1)
        for adapter in adapters:
            before = example.logits()
            with pytest.raises(NotMergeable, match="do not simply add up"):
                adapter.merge()
            assert torch.equal(example.logits(), before)


def test_two_of_one_kind_that_acts_in_training_are_refused(build: Build) -> None:
    methods = [LoRAPlus(ratio=4, targets="query"), LoRAPlus(targets="value")]
    with pytest.raises(ConfigError, match="must hold `lora_plus` once"):
        inject(build("bert").model, methods)


def test_a_refused_injection_leaves_an_outer_adapter_alone(build: Build) -> None:
    example = build("bert")
    adapter = inject(example.model, LoRA(), head=False)
    with pytest.raises(AdapterError, match="already carries"):
        inject(example.model.bert, LoRA(), head=False)
    assert all(slot_of(host) for _, host, _ in adapter.deltas)
    assert len(adapter.parameters()) == 2 * 12


def test_an_injection_that_fails_late_leaves_nothing(build: Build) -> None:
    example = build("bert")
    packed = torch.nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
    example.model.bert.register_parameter("packed", packed)
    with pytest.raises(AdapterError, match="int8 and cannot be trained"):
        inject(example.model, LoRA(), train="packed")
    assert not adapters_of(example.model)
    assert inject(example.model, LoRA()).parameters()


@pytest.mark.parametrize("leave", ["merge", "remove"])
def test_a_frozen_norm_is_left_in_the_mode_of_its_model(leave: str, build: Build) -> None:
    example = build("cnn")
    example.model.train()
    adapter = inject(example.model, LoRA())
    example.model.eval()
    output = example.logits()
    getattr(adapter, leave)()
    assert not any(module.training for module in example.model.modules())
    torch.testing.assert_close(example.logits(), output, rtol=1e-4, atol=1e-5)
    assert not [m for m in example.model.modules() if any("peft" in key for key in vars(m))]
