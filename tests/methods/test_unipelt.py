"""UniPELT: gates on a low-rank change, on a prefix and on adapters."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from torch import nn

from lightning_peft import BottleneckAdapter, PrefixTuning, inject
from lightning_peft.config import instantiate
from lightning_peft.delta import NotMergeable
from lightning_peft.errors import ConfigError, TargetError
from lightning_peft.methods import GatedLoRA

Build = Callable[[str], Any]
RECIPE = Path(__file__).parents[2] / "conf" / "method" / "unipelt.yaml"
GATED = (GatedLoRA(), PrefixTuning(tokens=4, gating="token"), BottleneckAdapter(gating="token"))


def recipe() -> list[Any]:
    specs = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["method"]
    return [instantiate(spec) for spec in specs.values()]


def stirred(model: nn.Module, methods: Any) -> Any:
    """Inject, and give every parameter a value that acts."""
    adapter = inject(model, methods, head=False)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(3)
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return adapter


def test_a_low_rank_change_is_what_the_formula_says() -> None:
    host = nn.Linear(6, 5)
    adapter = stirred(model := nn.Sequential(host, nn.Tanh()), GatedLoRA(r=3, targets="0"))
    named = {n.rpartition(".")[2]: p for n, p in adapter.named_parameters().items()}
    x = torch.randn(2, 4, 6)
    g = torch.sigmoid(x @ named["gate"].T + named["gate_bias"])
    change = g * (x @ named["lora_A"].T @ named["lora_B"].T)
    plain = x @ host.weight.T + host.bias
    torch.testing.assert_close(model(x), torch.tanh(plain + change))
    with pytest.raises(NotMergeable):
        adapter.merge()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_prefix_takes_its_share_times_the_gate(implementation: str, build: Build) -> None:
    model = build("bert").model
    model.set_attn_implementation(implementation)
    host = model.bert.encoder.layer[0].attention.self
    adapter = stirred(model, PrefixTuning(tokens=3, gating="token", layers=[0]))
    named = {n.rpartition(".")[2]: p for n, p in adapter.named_parameters().items()}
    x = torch.randn(2, 5, 32)
    (y,) = host(x)[:1]
    q, k, v = (
        layer(x).view(2, 5, host.num_attention_heads, -1).transpose(1, 2)
        for layer in (host.query, host.key, host.value)
    )
    keys = torch.cat([named["key"].expand(2, -1, -1, -1), k], 2)
    weights = (q @ keys.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
    share = weights[..., :3].sum(-1, keepdim=True)
    g = torch.sigmoid(x @ named["gate"].T + named["gate_bias"]).unsqueeze(1)
    own, further = weights[..., 3:] / (1 - share) @ v, weights[..., :3] / share @ named["value"]
    expected = (1 - g * share) * own + g * share * further
    torch.testing.assert_close(y, expected.transpose(1, 2).flatten(2), rtol=1e-5, atol=1e-6)


def test_a_closed_gate_is_the_base(build: Build) -> None:
    example = build("llama")
    base = example.logits()
    adapter = stirred(example.model, GATED)
    assert (example.logits() - base).abs().max() > 0.01
    with torch.no_grad():
        for name, parameter in adapter.named_parameters().items():
            if name.endswith("gate_bias"):
                parameter.fill_(-60.0)
    torch.testing.assert_close(example.logits(), base, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_padding_changes_nothing(name: str, build: Build) -> None:
    model = build(name).model.eval()
    stirred(model, GATED)
    ids, mask = torch.arange(5, 10)[None], torch.ones(1, 5, dtype=torch.long)
    wide, padded = torch.cat([ids, ids.new_zeros(1, 3)], 1), torch.cat([mask, mask[:, :3] * 0], 1)
    extra = {"decoder_input_ids": ids[:, :2]} if name == "t5" else {}
    with torch.no_grad():
        alone = model(input_ids=ids, attention_mask=mask, **extra).logits
        beside = model(input_ids=wide, attention_mask=padded, **extra).logits
    beside = beside[:, : alone.shape[1]] if alone.dim() == 3 else beside
    torch.testing.assert_close(beside, alone, rtol=1e-4, atol=1e-5)


def test_no_token_hears_of_a_later_one(build: Build) -> None:
    model = build("llama").model.eval()
    stirred(model, GATED)
    ids = torch.arange(5, 12)[None]
    with torch.no_grad():
        whole, part = model(input_ids=ids).logits, model(input_ids=ids[:, :4]).logits
    torch.testing.assert_close(whole[:, :4], part, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", ["XLNetConfig", "BloomConfig", "DistilBertConfig"])
def test_attention_of_every_layout_learns(config: str) -> None:
    # keys of folded batches, tokens before rows, and transformers' own interface
    settings = {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
    settings |= {"hidden_size": 32, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
    taken = getattr(transformers, config)(**settings)
    model = transformers.AutoModelForSequenceClassification.from_config(taken)
    adapter = inject(model, PrefixTuning(tokens=4, gating="token"))
    ids = torch.arange(3, 24).reshape(3, 7)
    model.config.pad_token_id = 0
    model(input_ids=ids).logits.square().sum().backward()
    gates = [p for n, p in adapter.named_parameters().items() if re.search("gate(_bias)?$", n)]
    assert len(gates) == 4
    assert all(p.grad is not None and p.grad.any() for p in gates)


def test_the_recipe_has_three_gated_parts(build: Build) -> None:
    methods = recipe()
    assert [m.kind for m in methods] == ["gated_lora", "prefix", "bottleneck"]
    adapter = inject(build("bert").model, methods)
    kinds = {
        n.split(".default_")[1].split(".")[0] for n in adapter.named_parameters() if "gate" in n
    }
    assert kinds == {"gated_lora", "prefix", "bottleneck"}


@pytest.mark.parametrize("gating", [None, "layer"])
def test_what_is_no_gate_is_refused(gating: Any) -> None:
    with pytest.raises(ConfigError, match="gating"):
        GatedLoRA(gating=gating)


def test_what_is_not_called_is_refused(build: Build) -> None:
    with pytest.raises(TargetError, match="linear layers that the model calls"):
        inject(build("bert").model, GatedLoRA(targets="word_embeddings"))
