"""Attention that is written out: watching it gives what transformers' interface gives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft import inject
from lightning_peft.delta import SLOT, Attending, slot_of
from lightning_peft.deltas.interception import Intercepted
from lightning_peft.methods import PTuningV2
from tests.deltas.test_attention import with_keys
from tests.zoo import build as build_from_zoo

Build = Callable[[str], Any]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "vit"])
def test_equals_the_interface(
    name: str, implementation: str, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = build(name)
    example.model.set_attn_implementation(implementation)
    adapter = with_keys(example.model)
    expected = example.output()
    expected.square().mean().backward()
    monkeypatch.setattr("lightning_peft.deltas.attention.route", lambda module: Intercepted)
    watched = build(name)
    watched.model.set_attn_implementation(implementation)
    ours = with_keys(watched.model)
    assert {type(h).__mro__[1] for _, h, _ in ours.deltas} == {Intercepted}
    torch.testing.assert_close(watched.output(), expected, rtol=1e-4, atol=1e-5)
    watched.output().square().mean().backward()
    for key, parameter in adapter.named_parameters().items():
        other = ours.named_parameters()[key]
        torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-3, atol=1e-6)


WRITTEN_OUT = [
    ("causal LM", "BloomForCausalLM"),
    ("causal LM", "GPTJForCausalLM"),
    ("causal LM", "FalconForCausalLM"),
    ("question answering", "XLNetForQuestionAnsweringSimple"),
    ("sequence classification", "DebertaV2ForSequenceClassification"),
    ("sequence classification", "LayoutLMv3ForSequenceClassification"),
    ("sequence classification", "FunnelForSequenceClassification"),
    ("seq2seq", "FSMTForConditionalGeneration"),
    ("seq2seq", "ProphetNetForConditionalGeneration"),
    ("image classification", "CvtForImageClassification"),
    ("image classification", "LevitForImageClassification"),
    ("image classification", "Swinv2ForImageClassification"),
]


@pytest.mark.parametrize(("head", "name"), WRITTEN_OUT)
def test_further_keys_far_away_change_nothing_and_near_ones_do(head: str, name: str) -> None:
    cell = build_from_zoo(head, name)
    cell.model.requires_grad_(False)  # which changes last bits of a convolution by itself
    base = cell.logits()
    adapter = inject(cell.model, PTuningV2(tokens=3), head=False)
    assert all(isinstance(host, Attending) for _, host, _ in adapter.deltas)
    near = cell.logits()
    assert not torch.allclose(near, base, atol=1e-6)
    with adapter.disabled():
        assert torch.equal(cell.logits(), base)
    loss = cell.loss()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())
    adapter.remove()
    assert torch.equal(cell.logits(), base)
    assert not any(SLOT in key for key in cell.model.state_dict())


class Written(nn.Module):
    """Attention as users write it, in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.qkv = way, nn.Linear(16, 48)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.way == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q, k) / 2 + mask
            y = torch.einsum("bhij,bhjd->bihd", scores.softmax(-1), v)
        elif self.way == "folded":
            q, k, v = (t.reshape(-1, *t.shape[2:]) for t in (q / 2, k, v))
            scores = torch.bmm(q, k.transpose(1, 2)).view(len(x), 4, *mask.shape[-2:]) + mask
            shares = F.softmax(scores, dim=-1).view(-1, *mask.shape[-2:])
            y = torch.bmm(shares, v).view(len(x), 4, -1, 4).transpose(1, 2)
        elif self.way == "shifted":
            scores = q @ k.mT * 0.5 + mask
            scores = scores - scores.amax(-1, keepdim=True)
            y = (scores.softmax(-1) @ v).transpose(1, 2)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
        return y.flatten(2)


@pytest.mark.parametrize("way", ["einsum", "folded", "shifted", "sdpa"])
@pytest.mark.parametrize("masked", [False, True])
def test_every_way_to_write_it_gives_the_paper_s_formula(way: str, masked: bool) -> None:
    from lightning_peft.delta import attach
    from lightning_peft.deltas.learned_keys import LearnedKeys
    from lightning_peft.structure.probe import Attention

    torch.manual_seed(0)
    host, x = Written(way), torch.randn(3, 5, 16)
    mask = torch.randn(3, 1, 5, 5) * masked
    seen = Attention(16, torch.empty(4, 0, 4), torch.empty(4, 0, 4), 1.0, 1.0)
    attach(host, "far", LearnedKeys(seen, 2, 0.0))
    delta = slot_of(host)["far"]
    q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in host.qkv(x).chunk(3, -1))
    keys = torch.cat([delta.key.expand(3, -1, -1, -1), k], 2)
    values = torch.cat([delta.value.expand(3, -1, -1, -1), v], 2)
    scores = q @ keys.mT / 2 + F.pad(mask, (2, 0))
    expected = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(host(x, mask), expected)
