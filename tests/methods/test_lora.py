"""LoRA on every kind of layer, its settings and its refusals."""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft import LoRA, Targets, inject, methods
from lightning_peft.carrying.registry import adapters_of
from lightning_peft.delta import SLOT, NotMergeable, slot_of
from lightning_peft.errors import ConfigError, TargetError

Build = Callable[[str], Any]


class Scaled(nn.Embedding):
    """A table that multiplies its rows, as in BART and Gemma."""

    embed_scale = 3.0

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 10, shape, generator=torch.Generator().manual_seed(3))


LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(6, 5), torch.randn(2, 3, 6)),
    "linear-without-bias": (lambda: nn.Linear(6, 5, bias=False), torch.randn(4, 6)),
    "linear-of-a-vector": (lambda: nn.Linear(6, 5), torch.randn(6)),
    "linear-of-nothing": (lambda: nn.Linear(6, 5), torch.randn(0, 6)),
    "linear-of-strided-input": (lambda: nn.Linear(6, 5), torch.randn(6, 3, 2).transpose(0, 2)),
    "conv1d-of-transformers": (lambda: Conv1D(5, 6), torch.randn(2, 3, 6)),
    "embedding": (lambda: nn.Embedding(10, 5), ids(2, 3)),
    "embedding-with-padding": (lambda: nn.Embedding(10, 5, padding_idx=0), ids(2, 3)),
    "embedding-of-one": (lambda: nn.Embedding(10, 5), torch.tensor(3)),
    "scaled-embedding": (lambda: Scaled(10, 5), ids(2, 3)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), torch.randn(2, 4, 9)),
    "conv1d-same": (lambda: nn.Conv1d(4, 6, 3, padding="same", dilation=2), torch.randn(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), torch.randn(2, 4, 9, 7)),
    "conv2d-uneven": (
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(0, 1), dilation=(2, 1)),
        torch.randn(2, 4, 9, 7),
    ),
    "conv2d-valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), torch.randn(2, 4, 9, 7)),
    "conv2d-of-one": (lambda: nn.Conv2d(4, 6, 3), torch.randn(4, 9, 7)),
    **{
        f"conv2d-{mode}": (
            lambda mode=mode: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode=mode),
            torch.randn(2, 4, 9, 7),
        )
        for mode in ("reflect", "replicate", "circular")
    },
}
IN_GROUPS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "conv1d-in-groups": (lambda: nn.Conv1d(4, 6, 3, groups=2), torch.randn(2, 4, 9)),
    "conv2d-depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), torch.randn(2, 4, 9, 7)),
}


def adapted(make: Callable[[], nn.Module], **settings: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(make())
    return model, inject(model, LoRA(**({"r": 4, "targets": "0"} | settings)), head=False)


def randomise(adapter: Any) -> None:
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.3)


@pytest.mark.parametrize("kind", LAYERS | IN_GROUPS)
def test_every_layer_starts_as_the_base_and_learns(kind: str) -> None:
    make, x = (LAYERS | IN_GROUPS)[kind]
    torch.manual_seed(0)
    base = make().requires_grad_(False)(x)
    layer, adapter = adapted(make)
    with torch.no_grad():
        assert torch.equal(layer(x), base)
    for _ in range(2):
        layer(x).square().sum().backward()
        with torch.no_grad():
            for parameter in adapter.parameters():
                assert parameter.grad is not None
                parameter.sub_(parameter.grad, alpha=0.1)
    assert layer(x).shape == base.shape
    assert x.numel() == 0 or all(p.grad.abs().sum() > 0 for p in adapter.parameters())


@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_merges_into_its_own_weight(kind: str) -> None:
    make, x = LAYERS[kind]
    layer, adapter = adapted(make)
    randomise(adapter)
    before, tuned = copy.deepcopy(layer), layer(x)
    assert adapter.merge() is layer
    torch.testing.assert_close(layer(x), tuned, rtol=1e-4, atol=1e-5)
    with adapters_of(before)["default"].disabled():
        assert x.numel() == 0 or not torch.allclose(before(x), tuned, atol=1e-3)
    assert list(layer.state_dict()) == [k for k in before.state_dict() if SLOT not in k]


@pytest.mark.parametrize("kind", IN_GROUPS)
def test_a_convolution_in_groups_is_not_merged(kind: str) -> None:
    make, x = IN_GROUPS[kind]
    layer, adapter = adapted(make)
    randomise(adapter)
    tuned, weight = layer(x), layer[0].weight.clone()
    with pytest.raises(NotMergeable, match="groups cannot hold the change"):
        adapter.merge()
    assert torch.equal(layer[0].weight, weight)
    assert torch.equal(layer(x), tuned)


def test_the_rank_must_fit_the_groups() -> None:
    with pytest.raises(ConfigError, match="`r` must be divisible by 4 groups, but is 6"):
        adapted(IN_GROUPS["conv2d-depthwise"][0], r=6)


def test_computes_what_the_paper_says() -> None:
    layer, adapter = adapted(lambda: nn.Linear(6, 5), r=3, alpha=7)
    randomise(adapter)
    b, a = (adapter.named_parameters()[f"0.{SLOT}.default_lora.lora_{m}"] for m in "BA")
    x = torch.randn(4, 6)
    expected = F.linear(x, layer[0].weight + 7 / 3 * b @ a, layer[0].bias)
    torch.testing.assert_close(layer(x), expected)
    assert (a.shape, b.shape) == ((3, 6), (5, 3))


@pytest.mark.parametrize(("rslora", "scale"), [(False, 16 / 8), (True, 16 / math.sqrt(8))])
def test_scale(rslora: bool, scale: float) -> None:
    layer, _ = adapted(lambda: nn.Linear(6, 5), r=8, rslora=rslora)
    assert slot_of(layer[0])["default_lora"].scale == pytest.approx(scale)


def test_initial_values_are_those_of_a_fresh_layer() -> None:
    layer, adapter = adapted(lambda: nn.Linear(512, 4), r=64)
    a, b = adapter.parameters()
    assert not b.any()
    assert a.abs().max() <= 1 / math.sqrt(512)
    assert a.std().item() == pytest.approx(1 / math.sqrt(3 * 512), rel=0.05)
    with torch.no_grad():
        a.zero_(), b.fill_(1.0)
    slot_of(layer[0])["default_lora"].reset_parameters()
    assert a.any()
    assert not b.any()


def test_called_by_keyword_and_with_a_tuple_beside_it() -> None:
    layer, adapter = adapted(lambda: nn.Linear(6, 5))
    randomise(adapter)
    x = torch.randn(2, 6)
    assert torch.equal(layer[0](input=x), layer(x))


def test_dropout_only_in_training_and_only_before_a() -> None:
    layer, adapter = adapted(lambda: nn.Linear(100, 5), dropout=0.5)
    randomise(adapter)
    x = torch.ones(200, 100)
    layer.train()
    noisy = layer(x)
    assert not torch.equal(noisy, layer(x))
    layer.eval()
    exact = layer(x)
    assert torch.equal(exact, layer(x))
    torch.testing.assert_close(noisy.mean(0), exact.mean(0), rtol=0.2, atol=0.5)
    with adapter.disabled():
        base = layer(x)
        layer.train()
        assert torch.equal(layer(x), base)


def test_an_embedding_drops_nothing() -> None:
    layer, adapter = adapted(lambda: nn.Embedding(10, 5), dropout=0.5)
    randomise(adapter)
    layer.train()
    assert torch.equal(layer(ids(3, 4)), layer(ids(3, 4)))


def test_padding_gets_no_gradient() -> None:
    layer, adapter = adapted(lambda: nn.Embedding(10, 5, padding_idx=0))
    randomise(adapter)
    layer(torch.tensor([[0, 1, 2]])).sum().backward()
    gradient = adapter.named_parameters()[f"0.{SLOT}.default_lora.lora_A"].grad
    assert gradient.abs().sum(0).nonzero().flatten().tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision_has_masters_in_full(dtype: torch.dtype) -> None:
    for make, x in LAYERS.values():
        torch.manual_seed(0)
        layer = nn.Sequential(make()).to(dtype)
        adapter = inject(layer, LoRA(r=4, targets="0"), head=False)
        assert {p.dtype for p in adapter.parameters()} == {torch.float32}
        randomise(adapter)
        y = layer(x.to(dtype) if x.is_floating_point() else x)
        assert y.dtype == dtype
        y.float().sum().backward()
        assert {p.grad.dtype for p in adapter.parameters()} == {torch.float32}
        reference = copy.deepcopy(layer).float()
        full = reference(x)
        torch.testing.assert_close(y.float(), full, rtol=0.05, atol=0.15)
        merged = adapter.merge()(x.to(dtype) if x.is_floating_point() else x)
        assert merged.dtype == dtype
        torch.testing.assert_close(merged.float(), full, rtol=0.05, atol=0.15)


def test_a_double_base_has_double_deltas() -> None:
    _, adapter = adapted(lambda: nn.Linear(6, 5).double())
    assert {p.dtype for p in adapter.parameters()} == {torch.float64}


@pytest.mark.parametrize("kind", ["linear", "conv1d-of-transformers", "conv2d", "embedding"])
def test_runs_under_autocast(kind: str) -> None:
    make, x = LAYERS[kind]
    layer, adapter = adapted(make)
    randomise(adapter)
    full = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    assert low.dtype == (torch.float32 if kind == "embedding" else torch.bfloat16)
    torch.testing.assert_close(low.float(), full, rtol=0.05, atol=0.05)
    low.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in adapter.parameters())


def test_a_quantised_weight_is_not_merged() -> None:
    layer, adapter = adapted(lambda: nn.Linear(6, 5))
    layer[0].weight = nn.Parameter(torch.ones(5, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(NotMergeable, match="is quantised"):
        adapter.merge()


@pytest.mark.parametrize(
    ("bias", "trained"),
    [
        ("none", set()),
        ("lora", {"fc1.bias"}),
        ("all", {"fc1.bias", "fc2.bias", "head.bias"}),
    ],
)
def test_biases(bias: Any, trained: set[str], build: Build) -> None:
    adapter = inject(build("mlp").model, LoRA(targets="fc1", bias=bias), head=False)
    assert set(adapter.in_place) == trained


def test_patterns_of_ranks_and_alphas_the_first_match_wins(build: Build) -> None:
    method = LoRA(
        targets=["query", "value"],
        rank_pattern={"layer.0.*.query": 2, "query": 3},
        alpha_pattern={"re:.*value": 1.0},
    )
    model = build("bert").model
    adapter = inject(model, method, head=False)
    deltas = {name: delta for name, _, delta in adapter.deltas}
    ranks = {n.removeprefix("bert.encoder.layer."): len(d.lora_A) for n, d in deltas.items()}
    assert ranks == {
        "0.attention.self.query": 2,
        "0.attention.self.value": 8,
        "1.attention.self.query": 3,
        "1.attention.self.value": 8,
    }
    scales = {d.scale for n, d in deltas.items() if n.endswith("value")}
    assert scales == {1 / 8}


@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("qury", "`qury` in a pattern of LoRA matches no target. Did you mean `query`?"),
        ("re:(", "is no regular expression"),
    ],
)
def test_a_pattern_that_matches_no_target_is_refused(
    setting: str, pattern: str, message: str, build: Build
) -> None:
    with pytest.raises(TargetError) as raised:
        inject(build("bert").model, LoRA(targets="query", **{setting: {pattern: 4}}))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "`r` must be at least 1, but is 0 instead"),
        ({"rank_pattern": {"query": -1}}, "`r` must be at least 1, but is -1 instead"),
        ({"dropout": 1.0}, r"`dropout` must lie in \[0, 1\), but is 1.0"),
        ({"bias": "some"}, "`bias` must be none, lora or all, but is 'some'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoRA(**settings)


def test_layers_are_given_once(build: Build) -> None:
    with pytest.raises(ConfigError, match=r"`layers` must be part of `targets`.*but is \[0\]"):
        inject(build("bert").model, LoRA(targets=Targets("query"), layers=[0]))


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoRA().r = 4  # type: ignore[misc]


def test_the_same_method_twice_on_one_module_is_refused(build: Build) -> None:
    model = build("mlp").model
    with pytest.raises(Exception, match="already carries a delta `default_lora`"):
        inject(model, [LoRA(targets="fc1"), LoRA(targets=["fc1", "fc2"])])
    both = inject(model, [LoRA(targets="fc1"), LoRA(targets="fc2", r=2)], head=False)
    assert [name for name, _, _ in both.deltas] == ["fc1", "fc2"]


def test_adapters_add_up(build: Build) -> None:
    example = build("mlp")
    base = example.logits()
    one = inject(example.model, LoRA(targets="head"), "one", head=False)
    two = inject(example.model, LoRA(targets="head", r=2), "two", head=False)
    one.activate()
    randomise(one)
    randomise(two)
    both = example.logits()
    with two.disabled():
        first = example.logits()
    with one.disabled():
        second = example.logits()
    torch.testing.assert_close(both - base, (first - base) + (second - base))
    one.merge()
    torch.testing.assert_close(example.logits(), both, rtol=1e-4, atol=1e-5)
    two.remove()
    torch.testing.assert_close(example.logits(), first, rtol=1e-4, atol=1e-5)


def test_saves_no_activation_of_its_own_but_the_low_rank_one() -> None:
    layer, _ = adapted(lambda: nn.Linear(64, 64))
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    x, saved = torch.randn(32, 64), {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    kept = {p: n for p, n in saved.items() if p not in weights and p != x.data_ptr()}
    assert list(kept.values()) == [32 * 4]


@pytest.mark.parametrize("head", [True, False])
def test_learns_on_a_real_encoder(head: bool, minilm: Any) -> None:
    base = minilm.logits()
    adapter = inject(minilm.model, LoRA(r=4), head=head)
    losses = []
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=5e-3)
    for _ in range(8):
        optimizer.zero_grad()
        loss = F.cross_entropy(minilm.output(), torch.tensor([0, 2]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    adapter.remove()
    assert torch.equal(minilm.logits(), base)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.trace_method. is deprecated:DeprecationWarning")
def test_traces_and_exports() -> None:
    make, x = LAYERS["linear"]
    layer, adapter = adapted(make)
    randomise(adapter)
    traced = torch.jit.trace(layer, x, check_trace=False)
    torch.testing.assert_close(traced(x), layer(x))
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("method", "name"),
    [
        *((m, "alpha") for m in ("LoRA", "DoRA", "PiSSA", "OLoRA", "LoRAPlus", "AdaLoRA", "EVA")),
        *((m, "alpha") for m in ("LoHa", "LoKr")),
        *((m, "scale") for m in ("FourierFT", "SHiRA")),
        ("BottleneckAdapter", "scaling"),
    ],
)
def test_a_strength_must_be_finite(method: str, name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"`{name}` must be finite"):
        getattr(methods, method)(**{name: value})


def test_strengths_by_pattern_must_be_finite() -> None:
    with pytest.raises(ConfigError, match="`alpha_pattern` must be finite"):
        LoRA(alpha_pattern={"query": float("nan")})
