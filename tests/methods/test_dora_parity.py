"""DoRA computes what peft's DoRA computes: outputs and gradients for the same weights."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_peft import inject
from lightning_peft.delta import SLOT
from lightning_peft.methods import DoRA

peft = pytest.importorskip("peft", reason="peft is not installed: run `pip install '.[dev]'`")

Build = Callable[[str], Any]

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    # what peft 0.21 asks of transformers 5.23
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

CASES: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "linear": ("bert", ["query", "value"], {}),
    "linear-of-a-decoder": ("llama", ["q_proj", "down_proj"], {}),
    "conv1d": ("gpt2", ["c_attn", "c_proj"], {"fan_in_fan_out": True}),
    "encoder-decoder": ("t5", ["q", "wo"], {}),
    "embedding": ("llama", ["embed_tokens", "q_proj"], {}),
    "conv2d": ("vit", ["patch_embeddings.projection", "q_proj"], {}),
}


def plain(name: str) -> str:
    """Return our name of a parameter of peft's."""
    for old, new in {
        "base_model.model.": "",
        ".default": "",
        "lora_embedding_": "lora_",
        "lora_magnitude_vector": "magnitude",
    }.items():
        name = name.replace(old, new)
    return name.removesuffix(".weight")


@pytest.mark.parametrize("case", CASES)
def test_outputs_gradients_and_merged_weights_equal_pefts(case: str, build: Build) -> None:
    name, targets, settings = CASES[case]
    example = build(name)
    model = example.model.double()
    example.inputs = {
        key: value.double() if value.is_floating_point() else value
        for key, value in example.inputs.items()
    }
    config = peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=targets, **settings)
    reference = peft.get_peft_model(copy.deepcopy(model), config).eval()
    adapter = inject(model, DoRA(r=4, alpha=6, targets=targets), head=False)
    named = {n: p for n, p in reference.named_parameters() if p.requires_grad}
    theirs = {plain(name): parameter for name, parameter in named.items()}
    pairs = []
    with torch.no_grad():
        for key, ours in adapter.named_parameters().items():
            other = theirs.pop(key.replace(f"{SLOT}.default_dora.", ""))
            ours.normal_(std=0.1)
            if key.endswith("magnitude"):
                other.add_(ours.view_as(other))
            else:
                other.copy_(ours)
            pairs.append((ours, other))
    assert not theirs
    output, expected = example.output(), example.output(reference)
    torch.testing.assert_close(output, expected, rtol=1e-7, atol=1e-12)
    for each in (output, expected):
        each.square().mean().backward()
    for ours, other in pairs:
        scale = other.grad.abs().max()
        assert scale > 0
        assert (ours.grad - other.grad.view_as(ours)).abs().max() <= 1e-7 * scale
    state, merged = adapter.merge().state_dict(), reference.merge_and_unload().state_dict()
    for key, tensor in state.items():
        torch.testing.assert_close(tensor, merged[key], rtol=1e-7, atol=1e-12)
