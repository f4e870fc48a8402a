"""DoRA: what the paper says, on every kind of layer, and what it refuses."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft import inject
from lightning_peft.delta import slot_of
from lightning_peft.errors import ConfigError, TargetError
from lightning_peft.methods import DoRA
from tests.benchmarks.lora_step import saved_bytes

Build = Callable[[str], Any]

IDS = torch.randint(0, 10, (2, 3), generator=torch.Generator().manual_seed(3))
LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(6, 5), torch.randn(2, 3, 6)),
    "linear-without-bias": (lambda: nn.Linear(6, 5, bias=False), torch.randn(4, 6)),
    "conv1d-of-transformers": (lambda: Conv1D(5, 6), torch.randn(2, 3, 6)),
    "embedding": (lambda: nn.Embedding(10, 5, padding_idx=0), IDS),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), torch.randn(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), torch.randn(2, 4, 9, 7)),
}


def adapted(make: Callable[[], nn.Module], **settings: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(make())
    return model, inject(model, DoRA(**({"r": 4, "targets": "0"} | settings)), head=False)


def randomise(adapter: Any) -> None:
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.3)


@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_starts_as_the_base_learns_and_merges(kind: str) -> None:
    make, x = LAYERS[kind]
    torch.manual_seed(0)
    base = make().requires_grad_(False)(x)
    layer, adapter = adapted(make)
    assert torch.equal(layer(x), base)
    for _ in range(2):
        layer(x).square().sum().backward()
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.sub_(parameter.grad, alpha=0.1)
    assert all(p.grad.abs().sum() > 0 for p in adapter.parameters())
    randomise(adapter)
    tuned = layer(x)
    torch.testing.assert_close(adapter.merge()(x), tuned, rtol=1e-4, atol=1e-5)


def test_computes_what_the_paper_says() -> None:
    layer, adapter = adapted(lambda: nn.Linear(6, 5), r=3, alpha=7)
    randomise(adapter)
    delta: Any = slot_of(layer[0])["default_dora"]
    x, weight = torch.randn(4, 6), layer[0].weight
    changed = weight + 7 / 3 * delta.lora_B @ delta.lora_A
    magnitude = weight.norm(dim=1) + delta.magnitude
    expected = magnitude[:, None] * changed / changed.norm(dim=1, keepdim=True).detach()
    wanted = F.linear(x, expected, layer[0].bias)
    torch.testing.assert_close(layer(x), wanted)
    gradients = [
        torch.autograd.grad(output.square().sum(), adapter.parameters())
        for output in (layer(x), wanted)
    ]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_small_changes_of_a_base_in_half_precision_are_not_lost() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16)
    adapter = inject(layer, DoRA(targets="0"), head=False)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    base = layer(x)
    with torch.no_grad():
        slot_of(layer[0])["default_dora"].magnitude.fill_(0.003)
    assert not torch.equal(layer(x), base)
    randomise(adapter)
    reference = copy.deepcopy(layer).float()
    torch.testing.assert_close(layer(x).float(), reference(x.float()), rtol=0.05, atol=0.15)


def test_an_output_without_weights_stays_finite() -> None:
    layer, adapter = adapted(lambda: nn.Linear(6, 5))
    with torch.no_grad():
        layer[0].weight[2] = 0.0
    output = layer(torch.randn(3, 6))
    output.sum().backward()
    assert output.isfinite().all()
    assert all(p.grad.isfinite().all() for p in adapter.parameters())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_attention_of_torch(build: Build) -> None:
    example = build("tagger")
    base = example.logits()
    adapter = inject(example.model, DoRA(targets=["self_attn", "out_proj"]), head=False)
    assert torch.equal(example.logits(), base)
    randomise(adapter)
    example.model.train()
    tuned = example.logits()
    torch.testing.assert_close(example.logits(adapter.merge()), tuned, rtol=1e-4, atol=1e-5)


def test_keeps_two_outputs_for_backward_and_nothing_as_large_as_the_weight() -> None:
    model = nn.Sequential(nn.Linear(256, 256))
    inject(model, DoRA(targets="0", r=4), head=False)

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Any:
            return type("Output", (), {"loss": self.model(x).sum()})

    kept = saved_bytes(Loss().train(), {"x": torch.randn(8, 256)})
    assert kept < 4 * 256 * 256


def test_a_rank_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="`r` must be at least 1, but is 0 instead"):
        DoRA(r=0)


def test_what_has_no_norm_is_refused() -> None:
    with pytest.raises(TargetError, match="neither quantised nor in groups"):
        adapted(lambda: nn.Conv2d(4, 4, 3, groups=4))
