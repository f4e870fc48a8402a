"""IA3 computes what peft's computes, on fused weights what scaled weights would."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import inject
from lightning_peft.delta import SLOT
from lightning_peft.errors import TargetError
from lightning_peft.methods.ia3 import IA3

peft = pytest.importorskip("peft", reason="peft is not installed: run `pip install '.[dev]'`")

Build = Callable[[str], Any]

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

CASES: dict[str, tuple[list[str] | str, list[str] | str]] = {
    "bert": (r".*(key|value|layer\.\d\.output\.dense)", r".*layer\.\d\.output\.dense"),
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "t5": (["k", "v", "wo"], ["wo"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "vit": (["k_proj", "v_proj", "fc2"], ["fc2"]),
}


def randomise(adapter: Any) -> None:
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.uniform_(0.5, 1.5)


def doubled(build: Build, name: str) -> Any:
    example = build(name)
    example.model.double()
    example.inputs = {
        k: v.double() if v.is_floating_point() else v for k, v in example.inputs.items()
    }
    return example


def reference_of(model: nn.Module, name: str) -> nn.Module:
    targets, inner = CASES[name]
    config = peft.IA3Config(target_modules=targets, feedforward_modules=inner)
    return peft.get_peft_model(copy.deepcopy(model), config).eval()


def their_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        n.removeprefix("base_model.model.").removesuffix(".ia3_l.default"): p
        for n, p in model.named_parameters()
        if "ia3_l" in n
    }


@pytest.mark.parametrize("name", CASES)
def test_outputs_gradients_and_merged_weights_equal_pefts(name: str, build: Build) -> None:
    example = doubled(build, name)
    reference = reference_of(example.model, name)
    adapter = inject(example.model, IA3(), head=False)
    theirs = their_parameters(reference)
    own = {n.partition(f".{SLOT}.")[0]: p for n, p in adapter.named_parameters().items()}
    assert own.keys() == theirs.keys()
    randomise(adapter)
    with torch.no_grad():
        for key, parameter in own.items():
            theirs[key].copy_(parameter.view_as(theirs[key]))

    output, expected = example.output(), example.output(reference)
    torch.testing.assert_close(output, expected, rtol=1e-7, atol=1e-12)
    for each in (output, expected):
        each.square().mean().backward()
    for key, parameter in own.items():
        wanted = theirs[key].grad.view_as(parameter)
        assert parameter.grad is not None
        assert wanted.abs().max() > 0
        assert (parameter.grad - wanted).abs().max() <= 1e-7 * wanted.abs().max(), key

    state, theirs_merged = adapter.merge().state_dict(), reference.merge_and_unload().state_dict()
    for key, tensor in state.items():
        torch.testing.assert_close(tensor, theirs_merged[key], rtol=1e-7, atol=1e-12)
    assert output.shape == example.logits().shape


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_torchs_attention_scales_the_rows_of_keys_and_values(build: Build) -> None:
    example = build("tagger")
    example.model.train()
    plain = copy.deepcopy(example.model)
    adapter = inject(example.model, IA3(feed_forward=()), head=False)
    randomise(adapter)
    with torch.no_grad():
        for (_, _, delta), layer in zip(adapter.deltas, plain.encoder.layers, strict=True):
            rows = torch.cat([torch.ones(32), delta.scale[:, 0]])
            layer.self_attn.in_proj_weight.mul_(rows[:, None])
            layer.self_attn.in_proj_bias.mul_(rows)
    torch.testing.assert_close(example.logits(), example.logits(plain))
    example.model.eval()
    torch.testing.assert_close(example.logits(), example.logits(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_fused_experts_scale_what_their_last_weight_receives(kind: str) -> None:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    nn.init.normal_(model.model.layers[0].mlp.experts.down_proj, std=0.1)
    plain, ids = copy.deepcopy(model), torch.arange(3, 10)[None]
    adapter = inject(model, IA3(keys_values=()), head=False)
    (delta,) = [delta for _, _, delta in adapter.deltas]
    assert delta.scale.numel() == 4 * 48
    randomise(adapter)
    with torch.no_grad():
        plain.model.layers[0].mlp.experts.down_proj.mul_(delta.scale)
        torch.testing.assert_close(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("name", ["bert", "resnet"])
def test_patterns_and_layers_choose(name: str, build: Build) -> None:
    model = build(name).model
    if name == "bert":
        adapter = inject(model, IA3(layers=[-1], keys_values="value"), head=False)
        hosts = ["bert.encoder.layer.1.attention.self.value", "bert.encoder.layer.1.output.dense"]
        assert sorted(n for n, _, _ in adapter.deltas) == hosts
    else:
        adapter = inject(model, IA3(keys_values="convolution", feed_forward=()), head=False)
        last = inject(model, IA3(), "other", head=False)
        assert len(last.deltas) == 4 < len(adapter.deltas)


def test_a_model_without_anything_to_scale_is_refused(build: Build) -> None:
    with pytest.raises(TargetError, match="no projection onto keys or values"):
        inject(build("mlp").model, IA3())
