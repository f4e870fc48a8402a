"""LoRA computes what peft's LoRA computes: outputs and gradients for the same weights."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import LoRA, inject
from lightning_peft.delta import SLOT
from tests.benchmarks.lora_step import saved_bytes

peft = pytest.importorskip("peft", reason="peft is not installed: run `pip install '.[dev]'`")

Build = Callable[[str], Any]

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    # what peft 0.21 asks of transformers 5.23
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "linear": ("bert", {"targets": ["query", "value"]}, {"target_modules": ["query", "value"]}),
    "linear-of-a-decoder": (
        "llama",
        {"targets": "all-linear", "r": 4, "alpha": 3},
        {"target_modules": "all-linear", "r": 4, "lora_alpha": 3},
    ),
    "conv1d": (
        "gpt2",
        {"targets": ["c_attn", "c_proj", "c_fc"]},
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    ),
    "rslora": (
        "llama",
        {"targets": "q_proj", "rslora": True, "r": 16},
        {"target_modules": ["q_proj"], "use_rslora": True, "r": 16},
    ),
    "ranks-and-alphas": (
        "bert",
        {
            "targets": r"re:.*encoder.*(query|dense)",
            "rank_pattern": {"query": 2, r"re:.*layer\.1\.output\.dense": 3},
            "alpha_pattern": {"attention.output.dense": 5},
        },
        {
            "target_modules": r".*encoder.*(query|dense)",
            "rank_pattern": {"query": 2, r"layer\.1\.output\.dense": 3},
            "alpha_pattern": {"attention.output.dense": 5},
        },
    ),
    "layers": (
        "bert",
        {"targets": "query", "layers": [-1]},
        {"target_modules": ["query"], "layers_to_transform": [1], "layers_pattern": "layer"},
    ),
    "embedding": (
        "llama",
        {"targets": ["embed_tokens", "q_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
    ),
    "embedding-with-padding": (
        "bert",
        {"targets": ["word_embeddings", "position_embeddings"]},
        {"target_modules": ["word_embeddings", "position_embeddings"]},
    ),
    "scaled-embedding": (
        "bart",
        {"targets": ["encoder.embed_tokens", "decoder.embed_tokens"]},
        {"target_modules": ["encoder.embed_tokens", "decoder.embed_tokens"]},
    ),
    "conv2d": (
        "cnn",
        {"targets": ["conv_stem", "conv_pw", "conv_pwl"], "r": 4},
        {"target_modules": ["conv_stem", "conv_pw", "conv_pwl"], "r": 4},
    ),
    "conv2d-in-groups": (
        "cnn",
        {"targets": "conv_dw", "r": 16},
        {"target_modules": ["conv_dw"], "r": 16},
    ),
    "conv2d-and-linear": (
        "vit",
        {"targets": ["patch_embeddings.projection", "q_proj"]},
        {"target_modules": ["patch_embeddings.projection", "q_proj"]},
    ),
    "biases-of-the-targets": (
        "bert",
        {"targets": ["query", "value"], "bias": "lora"},
        {"target_modules": ["query", "value"], "bias": "lora_only"},
    ),
    "all-biases": (
        "bert",
        {"targets": "query", "bias": "all"},
        {"target_modules": ["query"], "bias": "all"},
    ),
}


def reference_of(model: nn.Module, settings: dict[str, Any]) -> nn.Module:
    config = peft.LoraConfig(**({"lora_alpha": 16} | settings))
    return peft.get_peft_model(copy.deepcopy(model), config).eval()


def their_name(name: str) -> str:
    """Return peft's name of one of our parameters."""
    host, _, end = name.partition(f".{SLOT}.default_lora.")
    return f"base_model.model.{host}.{end}" if end else f"base_model.model.{name}"


def their_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    named = {}
    for name, parameter in model.named_parameters():
        plain = name.replace(".default.weight", "").replace(".default", "")
        named[plain.replace("lora_embedding_", "lora_").replace(".base_layer", "")] = parameter
    return named


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_pefts(case: str, build: Build) -> None:
    name, ours, theirs = CASES[case]
    example = build(name)
    model = example.model.double()
    example.inputs = {
        key: value.double() if value.is_floating_point() else value
        for key, value in example.inputs.items()
    }
    reference = reference_of(model, theirs)
    adapter = inject(model, LoRA(**ours), head=False)
    named = their_parameters(reference)
    trainable = {their_name(n): p for n, p in adapter.named_parameters().items()}
    assert set(trainable) == {n for n, p in named.items() if p.requires_grad}
    with torch.no_grad():
        for key, parameter in trainable.items():
            parameter.normal_(std=0.1)
            named[key].copy_(parameter)

    output, expected = example.output(), example.output(reference)
    torch.testing.assert_close(output, expected, rtol=1e-7, atol=1e-12)
    for each in (output, expected):
        each.square().mean().backward()
    # Softmax takes no notice of a bias of the keys, whose gradient is what rounding leaves.
    rounding = 1e-15 * max(float(named[key].grad.abs().max()) for key in trainable)
    for key, parameter in trainable.items():
        assert parameter.grad is not None, key
        scale = named[key].grad.abs().max()
        assert (parameter.grad - named[key].grad).abs().max() <= 1e-7 * scale + rounding, key
        assert scale > 0, key
    base, unchanged = example.logits(build(name).model.double()), output.detach()
    assert not torch.allclose(base, unchanged, rtol=1e-3)


@pytest.mark.parametrize("case", ["linear", "conv1d", "embedding-with-padding", "conv2d"])
def test_merged_weights_equal_pefts(case: str, build: Build) -> None:
    name, ours, theirs = CASES[case]
    model = build(name).model.double()
    reference = reference_of(model, theirs)
    adapter = inject(model, LoRA(**ours), head=False)
    named = their_parameters(reference)
    with torch.no_grad():
        for key, parameter in adapter.named_parameters().items():
            parameter.normal_(std=0.1)
            named[their_name(key)].copy_(parameter)
    state, expected = adapter.merge().state_dict(), reference.merge_and_unload().state_dict()
    for key, tensor in state.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_keeps_no_more_for_backward_than_peft(name: str, dropout: float, build: Build) -> None:
    example = build(name)
    settings = {"r": 4, "target_modules": "all-linear", "lora_dropout": dropout}
    reference = reference_of(example.model, settings | {"fan_in_fan_out": name == "gpt2"})
    inject(example.model, LoRA(r=4, targets="all-linear", dropout=dropout), head=False)
    labels = {"labels": torch.tensor([0, 1, 2])}
    batch = example.inputs | (labels if name == "bert" else {"labels": example.inputs["input_ids"]})
    kept, theirs = (saved_bytes(m.train(), batch) for m in (example.model, reference))
    assert 0 < kept <= (0.9 if dropout else 1) * theirs


def mixture(kind: str) -> nn.Module:
    import transformers

    settings: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 24, "num_local_experts": 4, "head_dim": 8,
        "pad_token_id": 0, "experts_implementation": "eager",
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**settings)
    return getattr(transformers, f"{kind}ForCausalLM")(config).double().eval()


def expert_pairs(reference: nn.Module, adapter: Any) -> list[tuple[Any, Any, Any]]:
    """Give peft's factors of each expert weight the values of ours, laid out in its way."""
    wrappers = {
        (name.split("layers.")[1].split(".")[0], module.parameter_name): module
        for name, module in reference.named_modules()
        if type(module).__name__ == "ParamWrapper"
    }
    pairs = []
    for host, _, delta in adapter.deltas:
        for name, part in delta.named_children():
            wrapper = wrappers.pop((host.split("layers.")[1].split(".")[0], name))
            a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
            with torch.no_grad():
                a.copy_(part.lora_A.normal_(std=0.1).reshape(a.shape))
                b.copy_(part.lora_B.normal_(std=0.1).permute(1, 2, 0).reshape(b.shape))
            pairs.append((part, a, b))
    assert not wrappers
    return pairs


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_experts_equal_pefts(kind: str) -> None:
    model = mixture(kind)
    names = [f"experts.{name}_proj" for name in ("gate_up", "down")]
    settings = {"target_modules": [], "target_parameters": names, "r": 3, "lora_alpha": 5}
    reference = reference_of(model, settings)
    adapter = inject(model, LoRA(r=3, alpha=5, targets="experts"), head=False)
    pairs = expert_pairs(reference, adapter)
    assert len(pairs) == 4
    ids = torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(1))
    output, expected = model(ids).logits, reference(ids).logits
    torch.testing.assert_close(output, expected, rtol=1e-7, atol=1e-12)
    for each in (output, expected):
        each.square().mean().backward()
    for part, a, b in pairs:
        torch.testing.assert_close(part.lora_A.grad.reshape(a.shape), a.grad, rtol=1e-7, atol=1e-14)
        gradient = part.lora_B.grad.permute(1, 2, 0).reshape(b.shape)
        torch.testing.assert_close(gradient, b.grad, rtol=1e-7, atol=1e-14)


def test_attention_of_torch_equals_pefts(build: Build) -> None:
    # Of the input projection alone: peft 0.21 adds the output projection's change twice.
    example = build("tagger")
    model = example.model.double().train()
    reference = reference_of(model, {"target_modules": ["self_attn"], "r": 4}).train()
    adapter = inject(model, LoRA(r=4, targets="self_attn"), head=False)
    named = their_parameters(reference)
    pairs = [
        (p, named[their_name(n.replace("in_proj_weight.", ""))])
        for n, p in adapter.named_parameters().items()
    ]
    with torch.no_grad():
        for ours, theirs in pairs:
            theirs.copy_(ours.normal_(std=0.1))
    output, expected = example.output(), example.output(reference)
    torch.testing.assert_close(output, expected, rtol=1e-7, atol=1e-12)
    for each in (output, expected):
        each.square().mean().backward()
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-14)
