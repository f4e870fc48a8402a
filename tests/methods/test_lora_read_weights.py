"""LoRA on weights that are read as tensors: of fused experts and of `nn.MultiheadAttention`."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import LoRA, inject
from lightning_peft.delta import SLOT
from lightning_peft.deltas.hosts import Parts

Build = Callable[[str], Any]

MIXTURE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WORDS = torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(1))


def mixtral(**settings: Any) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**MIXTURE, **settings)).eval()


def gpt_oss() -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    return GptOssForCausalLM(GptOssConfig(**MIXTURE, head_dim=8)).eval()


MIXTURES: dict[str, Callable[[], nn.Module]] = {
    "mixtral": mixtral,
    "mixtral-eager": lambda: mixtral(experts_implementation="eager"),
    "mixtral-batched": lambda: mixtral(experts_implementation="batched_mm"),
    "gpt-oss": gpt_oss,
}


def randomise(adapter: Any) -> None:
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.1)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(WORDS).logits


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_start_as_the_base_learn_and_merge(kind: str) -> None:
    model = MIXTURES[kind]()
    pristine = copy.deepcopy(model)
    base = logits(model)
    adapter = inject(model, LoRA(r=3))
    experts = {n.partition(f"{SLOT}.default_lora.")[2] for n in adapter.named_parameters()}
    assert {f"{p}.lora_{m}" for p in ("gate_up_proj", "down_proj") for m in "AB"} <= experts
    assert torch.equal(logits(model), base)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(WORDS).logits.square().mean().backward()
        optimizer.step()
    assert all(p.grad.abs().sum() > 0 for p in adapter.parameters())
    randomise(adapter)
    tuned = logits(model)
    assert not torch.allclose(tuned, base, atol=1e-3)
    with adapter.disabled():
        assert torch.equal(logits(model), base)
    merged = adapter.merge()
    torch.testing.assert_close(logits(merged), tuned, rtol=1e-4, atol=1e-5)
    assert [type(m) for m in merged.modules()] == [type(m) for m in pristine.modules()]


def test_experts_of_a_base_in_half_precision_have_masters_in_full() -> None:
    model = mixtral().to(torch.bfloat16)
    adapter = inject(model, LoRA())
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    model(WORDS).logits.float().square().mean().backward()
    randomise(adapter)
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["tagger", "translator"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_attention_of_torch_starts_as_the_base_learns_and_merges(name: str, build: Build) -> None:
    example = build(name)
    base = example.logits()
    adapter = inject(example.model, LoRA(targets=["self_attn", "out_proj"], r=4), head=False)
    # The base takes torch's fast path, whose fused kernels round otherwise on some processors.
    torch.testing.assert_close(example.logits(), base, rtol=1e-5, atol=1e-6)
    example.model.train()
    example.train(adapter.parameters())
    example.model.eval()
    assert all(p.grad.abs().sum() > 0 for p in adapter.parameters())
    tuned = example.logits()
    assert not torch.allclose(tuned, base, atol=1e-3)
    torch.testing.assert_close(example.output(example.model.train()), tuned, rtol=1e-4, atol=1e-5)
    merged = adapter.merge().eval()
    assert not any(SLOT in name for name, _ in merged.named_modules())
    torch.testing.assert_close(example.logits(merged), tuned, rtol=1e-4, atol=1e-5)


def test_attention_over_keys_of_another_width_has_a_pair_for_each_projection() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)).eval()
    inputs = torch.randn(2, 3, 8), torch.randn(2, 5, 6), torch.randn(2, 5, 4)
    adapter = inject(model, LoRA(r=2, targets=["0", "out_proj"]), head=False)
    shapes = {n.split(".")[-2:][0]: p.shape for n, p in adapter.named_parameters().items()}
    assert set(shapes) == {"q_proj_weight", "k_proj_weight", "v_proj_weight", "weight"}
    randomise(adapter)
    tuned, _ = model[0](*inputs)
    adapter.merge()
    torch.testing.assert_close(model[0](*inputs)[0], tuned)


@pytest.mark.parametrize("kind", ["tagger", "mixtral-batched"])
def test_compiles_whole(kind: str, build: Build) -> None:
    torch.compiler.reset()
    example = build("tagger")
    if kind != "tagger":
        example.model, example.inputs = MIXTURES[kind](), {"input_ids": WORDS}
    adapter = inject(example.model.train(), LoRA())
    randomise(adapter)
    compiled = torch.compile(example.model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(example.output(compiled), example.output())
    with adapter.disabled():
        torch.testing.assert_close(example.output(compiled), example.output())


def test_the_ranks_and_biases_of_settings_reach_them(build: Build) -> None:
    method = LoRA(targets="self_attn", rank_pattern={"layers.1.self_attn": 2}, bias="lora")
    adapter = inject(build("tagger").model, method, head=False)
    ranks = [delta.in_proj_weight.lora_A.shape[0] for _, _, delta in adapter.deltas]
    assert ranks == [8, 2]
    assert adapter.in_place == [f"encoder.layers.{i}.self_attn.in_proj_bias" for i in (0, 1)]


def test_a_layer_whose_weight_the_parent_reads_learns_and_merges() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=1, pad_token_id=0
    )
    model = MambaForCausalLM(config).eval()
    base = logits(model)
    adapter = inject(model, LoRA(r=2))
    assert torch.equal(logits(model), base)
    randomise(adapter)
    model(WORDS).logits.square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in adapter.parameters())
    mixer = model.backbone.layers[0].mixer
    delta = mixer.dt_proj.lightning_peft["default_lora"].weight
    change = delta.scale * delta.lora_B @ delta.lora_A
    torch.testing.assert_close(mixer.dt_proj.weight - mixer.dt_proj._parameters["weight"], change)
    tuned = logits(model)
    torch.testing.assert_close(logits(adapter.merge()), tuned, rtol=1e-4, atol=1e-5)


def test_a_loop_over_experts_changes_their_weight_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MIXTURES["mixtral-eager"]()
    inject(model, LoRA(targets="experts"))
    changed: list[str] = []
    reweigh = Parts.reweigh

    def counted(self: Parts, host: nn.Module, name: str, weight: Tensor) -> Tensor:
        changed.append(name)
        return reweigh(self, host, name, weight)

    monkeypatch.setattr(Parts, "reweigh", counted)
    logits(model)
    assert sorted(changed) == ["down_proj"] * 2 + ["gate_up_proj"] * 2
    logits(model)
    assert len(changed) == 8
