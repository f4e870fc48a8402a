"""LN-tuning trains what peft's trains; BitFit trains the biases, or says that there are none."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import inject
from lightning_peft.errors import TargetError
from lightning_peft.methods.bitfit import BitFit
from lightning_peft.methods.ln_tuning import LNTuning

peft = pytest.importorskip("peft", reason="peft is not installed: run `pip install '.[dev]'`")

Build = Callable[[str], Any]

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    # what peft 0.21 asks of transformers 5.23
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

NORMS = {
    "bert": ["LayerNorm"],
    "llama": ["input_layernorm", "post_attention_layernorm", "norm"],
    "t5": ["layer_norm", "final_layer_norm"],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
}


@pytest.mark.parametrize("name", NORMS)
def test_trains_what_pefts_trains_with_the_same_gradients(name: str, build: Build) -> None:
    example = build(name)
    example.model.double()
    config = peft.LNTuningConfig(target_modules=NORMS[name])
    reference = peft.get_peft_model(copy.deepcopy(example.model), config).eval()
    adapter = inject(example.model, LNTuning(), head=False)
    theirs = {
        n.removeprefix("base_model.model.").replace(".ln_tuning_layers.default", ""): p
        for n, p in reference.named_parameters()
        if p.requires_grad
    }
    own = adapter.named_parameters()
    assert own.keys() == theirs.keys()
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.add_(0.1 * torch.randn_like(parameter))
            theirs[key].copy_(parameter)
    output, expected = example.output(), example.output(reference)
    torch.testing.assert_close(output, expected, rtol=1e-7, atol=1e-12)
    for each in (output, expected):
        each.square().mean().backward()
    for key, parameter in own.items():
        assert parameter.grad is not None
        scale = theirs[key].grad.abs().max()
        assert scale > 0
        assert (parameter.grad - theirs[key].grad).abs().max() <= 1e-7 * scale, key


def test_gains_alone(build: Build) -> None:
    adapter = inject(build("bert").model, LNTuning(bias=False, layers=[0]), head=False)
    assert set(adapter.named_parameters()) == {
        f"bert.encoder.layer.0.{place}.LayerNorm.weight" for place in ("attention.output", "output")
    }


def test_norms_of_batches_are_trained_with_their_statistics(build: Build) -> None:
    example = build("cnn")
    state = {k: t.clone() for k, t in example.model.state_dict().items()}
    adapter = inject(example.model, LNTuning(), head=False)
    example.model.train()
    example.train(adapter.parameters())
    assert not torch.equal(
        example.model.state_dict()["bn1.running_mean"], state["bn1.running_mean"]
    )
    adapter.remove()
    assert all(torch.equal(t, state[k]) for k, t in example.model.state_dict().items())


def test_biases_alone(build: Build) -> None:
    model = build("bert").model
    biases = {n for n, _ in model.named_parameters() if n.endswith(".bias")}
    adapter = inject(model, BitFit(), head=False)
    assert set(adapter.named_parameters()) == biases - {"classifier.bias"}
    adapter.remove()
    adapter = inject(model, BitFit(targets=["query", "intermediate.dense"], layers=[1]), head=False)
    assert set(adapter.named_parameters()) == {
        "bert.encoder.layer.1.attention.self.query.bias",
        "bert.encoder.layer.1.intermediate.dense.bias",
    }


def test_torchs_attention_has_biases(build: Build) -> None:
    names = inject(build("tagger").model, BitFit(), head=False).named_parameters()
    assert "encoder.layers.0.self_attn.in_proj_bias" in names
    assert "encoder.layers.0.self_attn.out_proj.bias" in names


def test_models_without_them_are_refused(build: Build) -> None:
    for name in ("llama", "t5"):
        with pytest.raises(TargetError, match="has no biases to train"):
            inject(build(name).model, BitFit())
    with pytest.raises(TargetError, match="no norm with weights"):
        inject(nn.Sequential(nn.Linear(2, 2)), LNTuning())
