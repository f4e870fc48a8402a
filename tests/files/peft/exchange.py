"""The same adapter in peft and in ours, by way of a folder: models, and what moves between them."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import Adapter
from tests.conftest import Example

peft = pytest.importorskip("peft", reason="peft is not installed: run `pip install '.[dev]'`")

QUIET = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    # what peft 0.21 asks of transformers 5.23
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
"""Marks of a module that runs peft."""

Build = Callable[[str], Any]


class Attending(nn.Module):
    """A user's module around `nn.MultiheadAttention`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mha = nn.Embedding(64, 16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.classifier = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.classifier(self.mha(x, x, x, need_weights=False)[0])


def _decoder(kind: str, **settings: Any) -> nn.Module:
    import transformers

    common: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 24, "head_dim": 8, "pad_token_id": 0,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**common, **settings)
    return getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config)


EAGER: dict[str, Any] = {"experts_implementation": "eager"}
FURTHER: dict[str, Callable[[], nn.Module]] = {
    "attending": Attending,
    "mixtral": lambda: _decoder("Mixtral", num_local_experts=4, **EAGER),
    "gptoss": lambda: _decoder("GptOss", num_local_experts=4, **EAGER),
    "gemma3": lambda: _decoder("Gemma3Text"),  # a scaled and tied embedding
}
"""Models beside those of the conftest."""


def example(name: str, build: Build, dtype: torch.dtype = torch.float32) -> Example:
    """Return a model of either list, the same in every call."""
    if name not in FURTHER:
        made = build(name)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = FURTHER[name]().eval()
        ids = torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(1))
        made = Example(name, model, {"input_ids": ids})
    made.model.to(dtype)
    made.inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in made.inputs.items()}
    return made


@torch.no_grad()
def perturb(parameters: list[nn.Parameter]) -> None:
    """Move every trained tensor, so that none says nothing."""
    generator = torch.Generator().manual_seed(5)
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.add_(noise.to(parameter.dtype), alpha=0.1)


def in_peft(name: str, build: Build, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Return peft's model with the adapter in `folder`; it must know each setting and tensor."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(example(name, build, dtype).model, folder)
    told = [str(warning.message) for warning in caught]
    assert not [text for text in told if "nexpected" in text or "missing" in text]
    return model.eval().to(dtype)


def frozen(adapter: Adapter) -> dict[str, Tensor]:
    """Return copies of the base's tensors, without what the adapter trains."""
    state, own = adapter.model.state_dict(), adapter.state_dict()
    return {name: tensor.clone() for name, tensor in state.items() if name not in own}


def assert_trains_on(ours: Example, adapter: Adapter) -> None:
    """Assert that a step moves each tensor with a gradient and the output, and not the base."""
    base, output = frozen(adapter), ours.logits()
    before = {name: p.detach().clone() for name, p in adapter.named_parameters().items()}
    ours.train(adapter.parameters(), steps=1)
    assert not torch.equal(ours.logits(), output)
    moved = {n for n, p in adapter.named_parameters().items() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in adapter.named_parameters().items() if p.grad is not None}
    assert moved
    assert all(torch.equal(tensor, base[name]) for name, tensor in frozen(adapter).items())
