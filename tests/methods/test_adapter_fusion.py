"""AdapterFusion: attention over adapters that the model carries."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import PEFT, Adapter, BottleneckAdapter, LoRA, inject, load_adapter, switch
from lightning_peft.carrying.registry import adapters_of
from lightning_peft.delta import slot_of
from lightning_peft.errors import AdapterError, CheckpointError, ConfigError, TargetError
from lightning_peft.methods import AdapterFusion
from lightning_peft.methods.adapter_fusion import Fusion
from tests.lightning_modules import Module, loader, trainer

Build = Callable[[str], Any]


def fill(adapter: Adapter, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapter


def carrying(build: Build, name: str = "bert", **settings: Any) -> Any:
    example = build(name)
    for seed, each in enumerate(("one", "two", "three")):
        fill(inject(example.model, BottleneckAdapter(**settings), each, head=False), seed)
    return example


def test_it_is_what_the_paper_says(build: Build) -> None:
    example = carrying(build)
    host = example.model.bert.encoder.layer[0].output.dense
    adapter = fill(inject(example.model, AdapterFusion(), "mix", head=False), 9)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    host.register_forward_hook(lambda m, a, y: seen.append((m.__class__.forward(m, *a), y)))
    example.logits()
    h, y = seen[0]
    fusion = slot_of(host)["mix_fusion"]
    z = [slot_of(host)[f"{n}_bottleneck"](host, (), {}, h) - h for n in ("one", "two", "three")]
    scores = torch.stack([((h @ fusion.query.T) * (c @ fusion.key.T)).sum(-1) for c in z], -1)
    shares = scores.softmax(-1)
    mixed = sum(shares[..., [i]] * (c @ fusion.value.T) for i, c in enumerate(z))
    torch.testing.assert_close(y, h + mixed, rtol=1e-5, atol=1e-5)
    assert shares.std() > 0.01  # it does choose
    assert adapter.num_parameters == 2 * 3 * len(h[0, 0]) ** 2


@pytest.mark.parametrize(
    ("name", "placement"), [("bert", "parallel"), ("llama", "houlsby"), ("cnn", "pfeiffer")]
)
def test_equal_adapters_give_what_one_of_them_does(name: str, placement: str, build: Build) -> None:
    example = build(name)
    for each in ("one", "two"):
        fill(inject(example.model, BottleneckAdapter(placement=placement), each, head=False), 0)  # type: ignore[arg-type]
    alone = example.logits()
    inject(example.model, AdapterFusion(), "mix", head=False)  # V starts as the identity
    torch.testing.assert_close(example.logits(), alone, rtol=1e-4, atol=1e-5)


def test_it_learns_and_leaves_the_adapters_as_they_are(build: Build) -> None:
    example = carrying(build)
    before = {n: t.clone() for n, t in example.model.state_dict().items()}
    adapter = inject(example.model, AdapterFusion(adapters=["one", "three"]), "mix")
    for _ in range(3):
        example.train(adapter.parameters())
    after = example.model.state_dict()
    trained = {n for n, t in after.items() if n not in before or not torch.equal(t, before[n])}
    added = {n for n in adapter.state_dict() if n not in before}
    assert trained == set(adapter.named_parameters()) | added
    assert {n.rpartition(".")[2] for n in added} == {
        *("query", "key", "value", "depends_on_one", "depends_on_three")
    }
    assert not [n for n in trained if any(f".{each}_" in n for each in ("one", "two", "three"))]


def test_it_is_saved_without_the_adapters_and_needs_them(build: Build, tmp_path: Path) -> None:
    example = carrying(build)
    fill(inject(example.model, AdapterFusion(), "mix"), 4).save(tmp_path / "mix")
    expected = example.logits()
    with pytest.raises(TargetError, match="carries no adapters to fuse"):
        load_adapter(build("bert").model, tmp_path / "mix")
    again = carrying(build)
    load_adapter(again.model, tmp_path / "mix")
    assert torch.equal(again.logits(), expected)
    switch(again.model, "two")
    assert not torch.equal(again.logits(), expected)


@pytest.mark.parametrize(
    ("present", "message"),
    [
        ({"one": 0, "two": 1, "three": 2, "four": 3}, "depends_on_four` is missing"),
        ({"one": 0, "two": 1}, "depends_on_three` is unexpected"),
        ({"one": 0, "two": 7, "three": 2}, "another adapter `two`"),
    ],
)
def test_it_meets_no_other_adapters(
    present: dict[str, int], message: str, build: Build, tmp_path: Path
) -> None:
    fill(inject(carrying(build).model, AdapterFusion(), "mix"), 4).save(tmp_path / "mix")
    model = build("bert").model
    for name, seed in present.items():
        fill(inject(model, BottleneckAdapter(), name, head=False), seed)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_adapter(model, tmp_path / "mix")
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)


def test_a_fused_adapter_that_went_is_named(build: Build) -> None:
    example = carrying(build)
    adapter = inject(example.model, AdapterFusion(), "mix")
    adapters_of(example.model)["two"].remove()
    with pytest.raises(AdapterError, match="`two` is fused, but no longer in the model"):
        example.logits()
    adapter.remove()
    example.logits()


@pytest.mark.parametrize(
    ("adapters", "error", "message"),
    [
        (["on"], TargetError, r"carries no adapter `on` to fuse.*Did you mean `one`"),
        (["low"], AdapterError, r"must name bottleneck adapters, but `low` is of lora"),
        ((), AdapterError, r"must name bottleneck adapters, but `low` is of lora"),
    ],
)
def test_what_cannot_be_fused_is_refused(
    adapters: Any, error: Any, message: str, build: Build
) -> None:
    model = carrying(build).model
    inject(model, LoRA(), "low", head=False)
    with pytest.raises(error, match=message):
        inject(model, AdapterFusion(adapters=adapters), "mix")


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="must name each once"):
        AdapterFusion(adapters=["a", "a"])
    with pytest.raises(ConfigError, match=r"`dropout` must lie in \[0, 1\)"):
        AdapterFusion(dropout=1.0)


def test_a_callback_loads_what_it_fuses_and_a_checkpoint_too(tmp_path: Path) -> None:
    method = BottleneckAdapter(targets=["fc1", "fc2"], size=4)
    for seed, name in enumerate(("one", "two")):
        fill(inject(Module(), method, name), seed).save(tmp_path / name)
    beside = {name: str(tmp_path / name) for name in ("one", "two")}
    module: Any = Module()
    run = trainer(tmp_path, PEFT(AdapterFusion(), "mix", beside=beside))
    run.fit(module, loader(), loader())
    run.save_checkpoint(tmp_path / "mix.ckpt")
    batch = next(iter(loader()))[0]
    again: Any = PEFT.load_from_checkpoint(Module, tmp_path / "mix.ckpt")
    assert torch.equal(again.eval()(batch), module.eval()(batch))
    assert isinstance(slot_of(again.network.fc1)["mix_fusion"], Fusion)
    assert not any(isinstance(m, nn.Identity) for m in again.modules())
