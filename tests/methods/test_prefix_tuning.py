"""Prefix-tuning and P-tuning v2: where they go, how they start, what they refuse."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_peft import LoRA, Targets, inject, load_adapter
from lightning_peft.carrying.registry import adapters_of
from lightning_peft.delta import SLOT, NotMergeable, slot_of
from lightning_peft.errors import ConfigError, TargetError
from lightning_peft.methods import PrefixTuning, PTuningV2

Build = Callable[[str], Any]

METHODS = [PTuningV2(tokens=4), PrefixTuning(tokens=4), PrefixTuning(tokens=4, bottleneck=8)]


def hosts(adapter: Any) -> list[str]:
    return [name for name, _, delta in adapter.deltas if hasattr(delta, "learned")]


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "bart", "vit", "swin", "tagger"])
@pytest.mark.parametrize("method", METHODS, ids=["v2", "plain", "network"])
def test_every_parameter_learns(name: str, method: Any, build: Build) -> None:
    example = build(name)
    adapter = inject(example.model, method, head=False)
    before = {n: p.detach().clone() for n, p in adapter.named_parameters().items()}
    example.model.train()
    example.train(adapter.parameters(), steps=1)
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())
    assert all(not torch.equal(p, before[n]) for n, p in adapter.named_parameters().items())


def test_an_encoder_decoder_gets_three_kinds_of_prefix(build: Build) -> None:
    model = build("bart").model
    adapter = inject(model, PrefixTuning(bottleneck=8), head=False)
    kinds = {".".join(name.split(".")[1:2] + name.split(".")[-1:]) for name in hosts(adapter)}
    assert kinds == {"encoder.self_attn", "decoder.self_attn", "decoder.encoder_attn"}
    trunks = {n.split(".trunks.")[1][0] for n in adapter.named_parameters() if "trunks" in n}
    assert trunks == {"0", "1", "2"}
    assert {n.split(f".{SLOT}")[0] for n in adapter.named_parameters() if "trunks" in n} == {
        "model"
    }


def test_cross_attention_that_is_never_run_is_left_alone() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, add_cross_attention=True)
    model = GPT2LMHeadModel(config)
    adapter = inject(model, PTuningV2(), head=False)
    assert hosts(adapter) == ["transformer.h.0.attn", "transformer.h.1.attn"]


def test_keys_are_as_many_as_the_key_heads(build: Build) -> None:
    adapter = inject(build("llama").model, PTuningV2(tokens=3), head=False)
    assert {tuple(p.shape) for p in adapter.parameters()} == {(2, 3, 8)}


@pytest.mark.parametrize("method", METHODS, ids=["v2", "plain", "network"])
def test_starts_as_wide_as_real_keys_and_values(method: Any, build: Build) -> None:
    model = build("llama").model
    host = model.model.layers[1].self_attn
    with torch.no_grad():
        host.v_proj.weight.mul_(100)
    adapter = inject(model, dataclass_with(method, tokens=200), head=False)
    delta = next(d for n, _, d in adapter.deltas if n == "model.layers.1.self_attn")
    key, value = delta.learned()
    assert key.square().mean().sqrt().item() == pytest.approx(delta.spread[0], rel=0.35)
    assert value.square().mean().sqrt().item() == pytest.approx(delta.spread[1], rel=0.35)
    assert delta.spread[1] > 20 * delta.spread[0]


def dataclass_with(method: Any, **changes: Any) -> Any:
    import dataclasses

    return dataclasses.replace(method, **changes)


@pytest.mark.parametrize("bottleneck", [None, 8])
def test_starts_at_the_keys_and_values_of_tokens(bottleneck: int | None, build: Build) -> None:
    model = build("bert").model
    ids = (5, 9, 17, 4)
    seen: list[torch.Tensor] = []
    host = model.bert.encoder.layer[1].attention.self
    hook = host.key.register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    hook.remove()
    method = PrefixTuning(tokens=4, start_ids=ids, bottleneck=bottleneck)
    inject(model, method, head=False)
    key, _ = slot_of(host)["default_prefix"].learned()
    expected = seen[0].view(4, 4, 8).transpose(0, 1)
    torch.testing.assert_close(key.detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (PTuningV2, {"tokens": 0}, "`tokens` must be at least 1, but is 0 instead"),
        (PrefixTuning, {"dropout": 1}, r"`dropout` must lie in \[0, 1\), but is 1 instead"),
        (PrefixTuning, {"bottleneck": 0}, "`bottleneck` must be at least 1, or None, but is 0"),
        (PrefixTuning, {"start_ids": [3]}, "as many ids as there are `tokens`, 20, but holds 1"),
    ],
)
def test_settings_out_of_range_are_refused(method: Any, settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method(**settings)


def test_starts_at_a_text_cut_or_repeated(minilm_dir: Path) -> None:
    folder = str(minilm_dir)
    method = PrefixTuning(tokens=5, start_text="good or bad?", tokenizer=folder)
    assert len(method.start_ids) == 5
    assert method.start_ids[0] == method.start_ids[4]
    given = PrefixTuning(tokens=5, start_ids=method.start_ids)
    assert given.start_ids == method.start_ids
    with pytest.raises(ConfigError, match=r"`tokenizer` must name .*`start_text`"):
        PrefixTuning(start_text="good or bad?")


def test_starts_that_cannot_be_are_refused(build: Build) -> None:
    method = PrefixTuning(tokens=4, start_ids=(1, 2, 3, 4), bottleneck=3)
    with pytest.raises(
        ConfigError, match="`bottleneck` must be at least the number of `start_ids`"
    ):
        inject(build("bert").model, method)
    with pytest.raises(ConfigError, match="saw 17 keys for 4 tokens"):
        inject(build("vit").model, PrefixTuning(tokens=4, start_ids=(1, 2, 3, 4)))


@pytest.mark.parametrize("name", ["resnet", "mlp", "cnn"])
def test_a_model_without_attention_is_refused(name: str, build: Build) -> None:
    example = build(name)
    before = copy.deepcopy(example.model.state_dict())
    with pytest.raises(TargetError, match="has no attention that learned keys and values"):
        inject(example.model, PrefixTuning())
    assert all(torch.equal(t, before[n]) for n, t in example.model.state_dict().items())


def test_targets_and_layers_narrow_the_choice(build: Build) -> None:
    model = build("t5").model
    only = inject(model, PTuningV2(targets="SelfAttention", layers=[0]), head=False)
    assert hosts(only) == ["encoder.block.0.layer.0.SelfAttention"]
    only.remove()
    rest = Targets("EncDecAttention", exclude="block.0.*")
    assert len(hosts(inject(model, PrefixTuning(targets=rest), head=False))) == 1
    with pytest.raises(TargetError, match="attention modules that the model runs"):
        inject(model, PrefixTuning(targets="SelfAttention.q"), "other")


@pytest.mark.parametrize("method", METHODS, ids=["v2", "plain", "network"])
def test_cannot_be_merged(method: Any, build: Build) -> None:
    adapter = inject(build("bert").model, method)
    with pytest.raises(NotMergeable, match="cannot be merged"):
        adapter.merge()


def test_the_shared_part_stays_shared(build: Build, tmp_path: Path) -> None:
    example = build("bert")
    adapter = inject(example.model, PrefixTuning(bottleneck=8), head=False)
    for twin in (copy.deepcopy(example.model), pickle.loads(pickle.dumps(example.model))):
        theirs = adapters_of(twin)["default"]
        (trunks, *keys) = [delta for _, _, delta in theirs.deltas]
        assert all(delta.shared[0] is trunks.trunks[0] for delta in keys)
        assert torch.equal(example.logits(twin), example.logits())
    example.train(adapter.parameters())
    other = build("bert")
    load_adapter(other.model, adapter.save(tmp_path / "adapter"))
    assert torch.equal(other.logits(), example.logits())


@pytest.mark.parametrize("method", METHODS, ids=["v2", "plain", "network"])
def test_a_model_on_the_meta_device(method: Any, build: Build) -> None:
    example = build("llama")
    with torch.device("meta"):
        empty = type(example.model)(example.model.config)
    adapter = inject(empty, method, head=False)
    assert all(p.is_meta for p in adapter.parameters())
    empty.to_empty(device="cpu")
    empty.load_state_dict(example.model.state_dict(), strict=False)
    for module in empty.modules():
        if hasattr(module, "reset_parameters") and SLOT in repr(type(module).__module__):
            module.reset_parameters()
    assert all(p.isfinite().all() and p.std() > 0 for p in parameters_but_biases(adapter))


def parameters_but_biases(adapter: Any) -> list[nn.Parameter]:
    return [p for n, p in adapter.named_parameters().items() if not n.endswith("bias")]


def test_injection_draws_the_same_as_without_a_probe(build: Build) -> None:
    example = build("llama")
    example.model.train()
    torch.manual_seed(1)
    inject(example.model, PTuningV2(), head=False)
    after = torch.rand(1)
    torch.manual_seed(1)
    for _ in range(4):
        torch.empty(2, 20, 8).normal_()
    assert torch.equal(after, torch.rand(1))
    assert all(module.training for module in example.model.modules())


def test_works_beside_lora(build: Build) -> None:
    example = build("llama")
    base = example.logits()
    adapter = inject(example.model, [LoRA(r=2), PrefixTuning(tokens=4)], head=False)
    example.model.train()
    example.train(adapter.parameters())
    example.model.eval()
    assert not torch.equal(example.logits(), base)
    adapter.remove()
    assert torch.equal(example.logits(), base)


@pytest.mark.parametrize("method", METHODS, ids=["v2", "plain", "network"])
def test_learns_on_a_real_encoder(method: Any, minilm: Any) -> None:
    base = minilm.logits()
    adapter = inject(minilm.model, method)
    losses, optimizer = [], torch.optim.AdamW(adapter.parameters(), lr=5e-3)
    for _ in range(8):
        optimizer.zero_grad()
        loss = F.cross_entropy(minilm.output(), torch.tensor([0, 2]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    adapter.remove()
    assert torch.equal(minilm.logits(), base)
