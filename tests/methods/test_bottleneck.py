"""Bottleneck adapters: where they go, what they compute, their settings and refusals."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft import inject
from lightning_peft.errors import ConfigError, TargetError
from lightning_peft.methods.bottleneck import Bottleneck, BottleneckAdapter, Tap

Build = Callable[[str], Any]


def hosts(adapter: Any) -> list[str]:
    return [name for name, _, delta in adapter.deltas if isinstance(delta, Bottleneck)]


def randomise(adapter: Any, std: float = 0.3) -> None:
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=std)


FEED_FORWARD = {
    "bert": "bert.encoder.layer.{}.output.dense",
    "distilbert": "distilbert.transformer.layer.{}.ffn.lin2",
    "llama": "model.layers.{}.mlp.down_proj",
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "vit": "vit.layers.{}.mlp.fc2",
    "tagger": "encoder.layers.{}.linear2",
}


@pytest.mark.parametrize("name", FEED_FORWARD)
def test_pfeiffer_stands_behind_each_feed_forward(name: str, build: Build) -> None:
    adapter = inject(build(name).model, BottleneckAdapter(), head=False)
    assert hosts(adapter) == [FEED_FORWARD[name].format(i) for i in (0, 1)]


def test_houlsby_stands_behind_attention_too(build: Build) -> None:
    adapter = inject(build("t5").model, BottleneckAdapter(placement="houlsby"), head=False)
    assert hosts(adapter) == [
        *(f"encoder.block.{i}.layer.{j}" for i in (0, 1) for j in ("0.SelfAttention.o",
          "1.DenseReluDense.wo")),
        *(f"decoder.block.{i}.layer.{j}" for i in (0, 1) for j in ("0.SelfAttention.o",
          "1.EncDecAttention.o", "2.DenseReluDense.wo")),
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_torchs_attention_is_adapted_as_a_whole(build: Build) -> None:
    example = build("tagger")
    adapter = inject(example.model, BottleneckAdapter(placement="houlsby"), head=False)
    assert hosts(adapter)[:2] == ["encoder.layers.0.self_attn", "encoder.layers.0.linear2"]
    randomise(adapter)
    before = example.logits()
    with torch.no_grad():
        adapter.named_parameters()[
            "encoder.layers.1.self_attn.lightning_peft.default_bottleneck.up"
        ].zero_()
    assert not torch.allclose(example.logits(), before)


@pytest.mark.parametrize("placement", ["pfeiffer", "parallel"])
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "bart", "translator"])
def test_is_the_formula(name: str, placement: str, build: Build) -> None:
    example = build(name)
    example.model.double().train()  # in eval mode torch's encoder goes over to nested tensors
    settings: Any = {"placement": placement, "size": 5, "activation": "tanh", "scaling": 1.5}
    adapter = inject(example.model, BottleneckAdapter(**settings), head=False)
    randomise(adapter)
    seen: dict[str, Any] = {}
    _, host, delta = next(d for d in adapter.deltas if isinstance(d[2], Bottleneck))
    entry = next((h for _, h, d in adapter.deltas if isinstance(d, Tap)), host)
    entry.register_forward_pre_hook(lambda _, args: seen.setdefault("x", args[0]))
    host.register_forward_hook(lambda *a: seen.setdefault("h", a[2]), prepend=True)
    host.register_forward_hook(lambda *a: seen.setdefault("y", a[2]))
    example.logits()
    x = seen["x"] if placement == "parallel" else seen["h"]
    change = F.linear(torch.tanh(F.linear(x, delta.down, delta.down_bias)), delta.up, delta.up_bias)
    torch.testing.assert_close(seen["y"], seen["h"] + 1.5 * change)


def test_parallel_reads_what_the_feed_forward_reads(build: Build) -> None:
    """The attention of another sub-layer, or the stream before its norm, would give other sums."""
    for name, start in {"llama": "mlp", "bert": "intermediate.dense", "bart": "fc1"}.items():
        adapter = inject(build(name).model, BottleneckAdapter(placement="parallel"), head=False)
        assert adapter.deltas[0][0].endswith(start)


@pytest.mark.parametrize("name", ["bert", "tagger"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_parallel_compiles_copies_and_recomputes(name: str, build: Build) -> None:
    example = build(name)
    adapter = inject(example.model, BottleneckAdapter(placement="parallel"), head=False)
    randomise(adapter, 0.05)
    example.model.train()
    output = example.output()
    output.square().mean().backward()
    plain = {n: p.grad.clone() for n, p in adapter.named_parameters().items()}
    twin = copy.deepcopy(example.model)
    torch.testing.assert_close(example.output(twin), output, rtol=0, atol=0)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(example.output(compiled), output, rtol=1e-5, atol=1e-6)

    example.model.zero_grad()
    leaf = torch.zeros((), requires_grad=True)

    def run(zero: Tensor) -> Tensor:
        return example.output() + zero

    checkpoint(run, leaf, use_reentrant=False).square().mean().backward()
    for key, parameter in adapter.named_parameters().items():
        torch.testing.assert_close(parameter.grad, plain[key], rtol=1e-5, atol=1e-7)


def test_parallel_in_two_threads_at_once(build: Build) -> None:
    example = build("bert")
    randomise(inject(example.model, BottleneckAdapter(placement="parallel"), head=False))
    rows = [{k: v[i : i + 1] for k, v in example.inputs.items()} for i in range(3)]
    alone = [example.model(**row)[0] for row in rows]
    results: dict[int, Tensor] = {}

    def run(i: int) -> None:
        for _ in range(10):
            results[i] = example.model(**rows[i])[0]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, expected in enumerate(alone):
        torch.testing.assert_close(results[i], expected)


def test_two_parallel_adapters_do_not_mix(build: Build) -> None:
    example = build("bert")
    base = example.logits()
    method = BottleneckAdapter(placement="parallel")
    first = inject(example.model, method, "first", head=False)
    second = inject(example.model, method, "second", head=False)
    randomise(first)
    alone = example.logits()
    randomise(second)
    with first.disabled(), second.disabled():
        assert torch.equal(example.logits(), base)
    with second.disabled():
        assert torch.equal(example.logits(), alone)
    assert not torch.allclose(example.logits(), alone)


def test_experts_are_one_sub_layer() -> None:
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    for placement in ("pfeiffer", "parallel"):
        adapter = inject(copy.deepcopy(model), BottleneckAdapter(placement=placement), head=False)
        assert hosts(adapter) == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_a_layer_with_one_mixer_gets_one_adapter() -> None:
    import transformers

    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)
    model = transformers.MambaForCausalLM(config)
    for placement in ("pfeiffer", "houlsby"):
        adapter = inject(copy.deepcopy(model), BottleneckAdapter(placement=placement), head=False)
        assert hosts(adapter) == [f"backbone.layers.{i}.mixer.out_proj" for i in (0, 1)]


@pytest.mark.parametrize("name", ["resnet", "cnn"])
def test_convolutions_are_adapted_channel_by_channel(name: str, build: Build) -> None:
    example = build(name)
    base = example.logits()
    adapter = inject(example.model, BottleneckAdapter(size=3), head=False)
    assert torch.equal(example.logits(), base)
    randomise(adapter)
    _, host, delta = adapter.deltas[0]
    h = torch.randn(2, host.out_channels, 4, 4)
    changed = delta(host, (h,), {}, h)
    one = delta._change(h[:, :, 1, 2])
    torch.testing.assert_close(changed[:, :, 1, 2], h[:, :, 1, 2] + one)
    assert not torch.allclose(example.logits(), base)


def test_the_lowest_layers_can_go_without(build: Build) -> None:
    model = build("bert").model
    assert hosts(inject(model, BottleneckAdapter(leave_out=1), head=False)) == [
        "bert.encoder.layer.1.output.dense"
    ]
    with pytest.raises(TargetError, match="`leave_out` must be less than 2"):
        inject(model, BottleneckAdapter(leave_out=2), "other")


def test_dropping_adapters_and_dropout_act_in_training_only(build: Build) -> None:
    for settings in ({"layer_drop": 0.5}, {"dropout": 0.5}):
        example = build("bert")
        adapter = inject(example.model, BottleneckAdapter(**settings), head=False)
        randomise(adapter)
        assert torch.equal(example.logits(), example.logits())
        example.model.train()
        torch.manual_seed(0)
        outputs = [example.logits() for _ in range(12)]
        kinds = {tuple(o.flatten().tolist()) for o in outputs}
        few = "layer_drop" in settings  # both adapters, one of them, or none
        assert 1 < len(kinds) <= (4 if few else 12)


def test_a_gate_per_token_is_causal_and_one_per_sequence_is_not(build: Build) -> None:
    for gating in ("token", "sequence"):
        example = build("llama")
        randomise(inject(example.model, BottleneckAdapter(gating=gating), head=False))
        ids = example.inputs["input_ids"][:1]
        whole, part = (example.model(input_ids=i)[0].detach() for i in (ids, ids[:, :4]))
        same = torch.allclose(whole[:, :4], part, atol=1e-5)
        assert same == (gating == "token")


def test_the_bottleneck_is_as_wide_as_its_settings_say(build: Build) -> None:
    for settings, size in (
        ({"size": 3}, 3),
        ({"reduction_factor": 2}, 16),
        ({"reduction_factor": 0.5}, 64),
        ({"reduction_factor": 16}, 8),
    ):
        adapter = inject(build("bert").model, BottleneckAdapter(**settings), head=False)
        assert adapter.deltas[0][2].down.shape == (size, 32)


def test_targets_choose_modules_without_layers(build: Build) -> None:
    example = build("mlp")
    with pytest.raises(TargetError, match="no stack of layers"):
        inject(example.model, BottleneckAdapter())
    adapter = inject(example.model, BottleneckAdapter(targets="fc2", size=2), head=False)
    assert hosts(adapter) == ["fc2"]


def test_a_parallel_adapter_needs_a_feed_forward(build: Build) -> None:
    with pytest.raises(TargetError, match="for a parallel adapter"):
        inject(build("resnet").model, BottleneckAdapter(placement="parallel"))


def test_keeps_float32_masters_beside_a_bfloat16_base(build: Build) -> None:
    example = build("llama")
    example.model.bfloat16()
    adapter = inject(example.model, BottleneckAdapter(gating="token", layer_norm=True))
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert example.logits().dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"placement": "sideways"}, "`placement` must be"),
        ({"size": 0}, "`size` must be at least 1"),
        ({"reduction_factor": 0}, "`reduction_factor` positive"),
        ({"activation": "relu6"}, "`activation` must be one of relu"),
        ({"dropout": 1.0}, r"`dropout` must lie in \[0, 1\)"),
        ({"layer_drop": -0.1}, r"`layer_drop` must lie in \[0, 1\)"),
        ({"scaling": "lots"}, '`scaling` must be a number or "learned"'),
        ({"gating": "always"}, "`gating` must be token, sequence or None"),
        ({"leave_out": -1}, "`leave_out` must not be negative"),
        ({"targets": "fc1", "leave_out": 1}, "`targets` must be None"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BottleneckAdapter(**settings)


def test_the_whole_module_is_a_child_of_nothing_but_its_host(build: Build) -> None:
    model: nn.Module = build("bert").model
    adapter = inject(model, BottleneckAdapter(placement="parallel"), head=False)
    taps = [d for _, _, d in adapter.deltas if isinstance(d, Tap)]
    assert taps
    assert not any(list(tap.parameters()) for tap in taps)
