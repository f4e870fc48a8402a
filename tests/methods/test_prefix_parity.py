"""Prefix-tuning computes what peft's (decoders) and adapters' (encoders) compute."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_peft import Adapter, inject
from lightning_peft.delta import SLOT
from lightning_peft.methods import PrefixTuning, PTuningV2
from tests.oracles.filling import fill

peft = pytest.importorskip("peft", reason="peft is not installed: run `pip install '.[dev]'`")

Build = Callable[[str], Any]
ORACLES = Path(__file__).parents[1] / "oracles"
N, LAYERS, WIDTH = 5, 2, 6

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    # what peft 0.21 asks of transformers 5.23
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def parts(adapter: Adapter, end: str) -> list[nn.Parameter]:
    """Return a tensor of all layers: keys and values of the first, of the second, ..."""
    named = adapter.named_parameters()
    keys, values = ([p for n, p in named.items() if n.endswith(k + end)] for k in ("key", "value"))
    return [p for pair in zip(keys, values, strict=True) for p in pair]


def flat(tensors: list[Any]) -> Tensor:
    """Return keys and values `(heads, n, d)` of all layers as one matrix `(n, layers * 2 * d)`."""
    return torch.cat([t.transpose(0, 1).flatten(1) for t in tensors], 1)


def outputs(model: nn.Module, ids: Tensor, **inputs: Tensor) -> Tensor:
    output: Tensor = model(input_ids=ids, **inputs).logits
    output.square().mean().backward()
    return output.detach()


def assert_equal(one: Tensor | None, other: Tensor | None) -> None:
    assert one is not None
    assert other is not None
    assert other.abs().max() > 0
    assert (one - other).abs().max() <= 1e-7 * other.abs().max()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("method", [PTuningV2, PrefixTuning])
def test_as_trained_equals_pefts(name: str, method: Any, build: Build) -> None:
    model = build(name).model.double()
    ids = torch.arange(3, 24).reshape(3, 7)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N)
    reference = peft.get_peft_model(copy.deepcopy(model), config).double().eval()
    adapter = inject(model, method(tokens=N), head=False)
    table = reference.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        table.copy_(flat(parts(adapter, "")))
    # peft keeps the prefix in the cache, so its tokens stand n positions further.
    offset = torch.arange(N, N + 7)[None]
    assert_equal(outputs(model, ids, position_ids=offset), outputs(reference, ids))
    assert_equal(flat([p.grad for p in parts(adapter, "")]), table.grad)


def test_with_a_network_equals_pefts(build: Build) -> None:
    model = build("gpt2").model.double()
    ids = torch.arange(3, 24).reshape(3, 7)
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=N,
        prefix_projection=True,
        encoder_hidden_size=WIDTH,
    )
    reference = peft.get_peft_model(copy.deepcopy(model), config).double().eval()
    theirs = reference.prompt_encoder["default"]
    adapter = inject(model, PrefixTuning(tokens=N, bottleneck=WIDTH), head=False)
    pairs = network(adapter, theirs.embedding.weight, theirs.transform[0], theirs.transform[2])
    with torch.no_grad():
        for ours, other in pairs():
            other.copy_(ours)
    offset = torch.arange(N, N + 7)[None]
    assert_equal(outputs(model, ids, position_ids=offset), outputs(reference, ids))
    for ours, other in pairs(gradients=True):
        assert_equal(ours, other)


def network(adapter: Adapter, table: Any, first: Any, second: Any) -> Callable[..., Any]:
    """Return a function that pairs our tensors with those of an embedding and two layers."""
    trunk = {
        n.rpartition(".")[2]: p for n, p in adapter.named_parameters().items() if "trunks" in n
    }

    def pairs(gradients: bool = False) -> list[tuple[Any, Any]]:
        def of(parameter: Any) -> Any:
            return parameter.grad if gradients else parameter

        weights = [of(p).flatten(0, 1) for p in parts(adapter, "_weight")]
        biases = [of(p).flatten() for p in parts(adapter, "_bias")]
        return [
            (of(trunk["embedding"]), of(table)),
            (of(trunk["weight"]), of(first.weight)),
            (of(trunk["bias"]), of(first.bias)),
            (torch.cat(weights), of(second.weight)),
            (torch.cat(biases), of(second.bias)),
        ]

    return pairs


class Theirs(nn.Module):
    """The tensors of adapters' prefix-tuning, filled as in the oracle."""

    def __init__(self, network: bool) -> None:
        super().__init__()
        size = LAYERS * 2 * 32
        if network:
            self.wte = nn.Embedding(N, 32)
            self.control_trans: Any = nn.Sequential(
                nn.Linear(32, WIDTH), nn.Tanh(), nn.Linear(WIDTH, size)
            )
        else:
            self.control_trans = nn.Parameter(torch.empty(N * size))
        self.double()
        fill(dict(self.named_parameters()))


@pytest.mark.parametrize("case", ["flat", "network"])
def test_equals_adapters(case: str, build: Build) -> None:
    model = build("bert").model.double()
    fill(dict(model.named_parameters()))
    stored = load_file(ORACLES / f"adapters-bert-prefix-{case}.safetensors")
    theirs = Theirs(case == "network")
    method = PrefixTuning(tokens=N, bottleneck=WIDTH if case == "network" else None)
    adapter = inject(model, method, head=False)
    if case == "network":
        pairs = network(
            adapter, theirs.wte.weight, theirs.control_trans[0], theirs.control_trans[2]
        )
        with torch.no_grad():
            for name, split in (("_weight", (4, 4, 8, WIDTH)), ("_bias", (4, 4, 8))):
                source = getattr(theirs.control_trans[2], name[1:]).view(split)
                for ours, other in zip(parts(adapter, name), source, strict=True):
                    ours.copy_(other)
            for ours, other in pairs()[:3]:
                ours.copy_(other)
    else:
        with torch.no_grad():
            rows = theirs.control_trans.view(N, LAYERS * 2, 4, 8).permute(1, 2, 0, 3)
            for ours, other in zip(parts(adapter, ""), rows, strict=True):
                ours.copy_(other)
    ids = torch.arange(3, 24).reshape(3, 7)
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    assert_equal(outputs(model, ids, attention_mask=mask), stored["logits"])
    if case == "flat":
        ours = flat([p.grad for p in parts(adapter, "")]).flatten()
        assert_equal(ours, stored["grad.control_trans"])
        return
    for name, parameter in theirs.named_parameters():
        parameter.grad = stored[f"grad.{name}"]
    for ours, other in pairs(gradients=True):
        assert_equal(ours, other)


def test_the_shared_part_stands_above_the_layers(build: Build) -> None:
    adapter = inject(build("bert").model, PrefixTuning(bottleneck=WIDTH), head=False)
    trunk = [n for n in adapter.named_parameters() if "trunks" in n]
    assert {n.split(f".{SLOT}.")[0] for n in trunk} == {"bert.encoder"}
