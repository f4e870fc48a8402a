"""Modules that write into their own buffers in training stay as they are in a frozen base."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import Freeze, LoRA, inject
from lightning_peft.structure.drift import calls_forward, drifts, recomputing


class Ranges(nn.Module):
    """Remembers how large its inputs are while it trains, as quantisation does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("largest", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the input."""
        if self.training:
            self.largest = torch.maximum(self.largest, x.detach().abs().max())
        return x


class Constant(nn.Module):
    """Has a buffer and asks whether it trains, but changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the input."""
        return x * self.steps if self.training else x


class Watched(nn.Module):
    """A network with both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.ranges, self.norm = nn.Linear(6, 6), Ranges(), nn.BatchNorm1d(6)
        self.constant, self.head = Constant(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores."""
        scores: Tensor = self.head(self.constant(self.norm(self.ranges(self.first(x)))))
        return scores


def test_found_by_what_the_code_writes() -> None:
    model = Watched()
    found = [name for name, module in model.named_modules() if drifts(module)]
    assert found == ["ranges", "norm"]
    assert not drifts(nn.InstanceNorm1d(4))


def test_what_drifts_is_held_and_let_go() -> None:
    model = Watched().train()
    before = copy.deepcopy(model.state_dict())
    adapter = inject(model, LoRA(targets="first"), head=False)
    model.train()(torch.randn(4, 6)).sum().backward()
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items() if n in before)
    adapter.remove()
    model.train()(torch.randn(4, 6))
    assert not torch.equal(before["ranges.largest"], model.ranges.largest)
    assert type(model.ranges) is Ranges


def reformer() -> Any:
    from transformers import ReformerConfig, ReformerForSequenceClassification

    return ReformerForSequenceClassification(
        ReformerConfig(
            vocab_size=64, hidden_size=32, num_attention_heads=2, attention_head_size=8,
            feed_forward_size=48, attn_layers=["local", "local"], axial_pos_embds=False,
            max_position_embeddings=40, local_attn_chunk_length=4, hidden_dropout_prob=0.0,
            is_decoder=False,
        )
    )  # fmt: skip


def test_layers_in_an_autograd_function_of_their_own_learn() -> None:
    model = reformer()
    assert [type(m).__name__ for m in recomputing(model)] == ["ReformerEncoder"]
    ids = torch.arange(3, 27).view(3, 8)
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    adapter = inject(model, LoRA(), head=False)
    model.train()(input_ids=ids, labels=torch.arange(3) % 2).loss.backward()
    reached = [n for n, p in adapter.named_parameters().items() if n.endswith("B")]
    assert all(adapter.named_parameters()[n].grad.any() for n in reached)
    adapter.remove()
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks


class Caching(nn.Linear):
    """Keeps what it made of its weight in eval mode until it trains."""

    made: Tensor | None = None

    def train(self, mode: bool = True) -> "Caching":
        """Forget it."""
        self.made = None if mode else self.made
        super().train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return the product."""
        if self.training:
            return x @ self.weight.T
        self.made = self.weight.T.clone() if self.made is None else self.made
        return x @ self.made


@pytest.mark.parametrize("leave", ["remove", "disabled"])
def test_what_a_module_made_of_trained_weights_is_made_anew(leave: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Caching(4, 4)).eval()
    x = torch.randn(2, 4)
    with torch.no_grad():
        base = model(x)
        adapter = inject(model, Freeze(layers=0, patterns="1"), head=False)
        model.train()
        for parameter in adapter.parameters():
            parameter.add_(1.0)
        model.eval()
        assert not torch.equal(model(x), base)
        if leave == "remove":
            adapter.remove()
            assert torch.equal(model(x), base)
        else:
            with adapter.disabled():
                assert torch.equal(model(x), base)


class Loop(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            x = layer.forward(x)
        return x


class Outer(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super(nn.Linear, self).forward(x) + super().forward(x)


def test_a_call_of_forward_by_its_name_is_told_from_one_of_the_base_class() -> None:
    assert calls_forward(Loop)
    assert not calls_forward(Outer)
    assert not calls_forward(nn.Sequential)
