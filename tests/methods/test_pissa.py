"""PiSSA, OLoRA and LoftQ: low-rank changes that start in the weight, and leave it as it is."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import inject, load_adapter
from lightning_peft.delta import SLOT
from lightning_peft.errors import AdapterError, ConfigError
from lightning_peft.methods import LoftQ, OLoRA, PiSSA

peft = pytest.importorskip("peft", reason="peft is not installed: run `pip install '.[dev]'`")

Build = Callable[[str], Any]

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    # what peft 0.21 asks of transformers 5.23
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(6, 5), torch.randn(2, 3, 6)),
    "linear-narrower-than-the-rank": (lambda: nn.Linear(6, 2), torch.randn(2, 3, 6)),
    "embedding": (lambda: nn.Embedding(10, 5), torch.tensor([[1, 2], [3, 4]])),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), torch.randn(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), torch.randn(2, 4, 9, 7)),
}
METHODS: dict[str, Callable[..., Any]] = {"pissa": PiSSA, "olora": OLoRA, "loftq": LoftQ}


def randomise(adapter: Any) -> None:
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_starts_as_the_base_learns_and_merges(kind: str, method: str) -> None:
    make, x = LAYERS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(make())
    base = model(x).detach()
    adapter = inject(model, METHODS[method](r=3, targets="0"), head=False)
    assert torch.equal(model(x), base)
    model(x).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in adapter.parameters())  # both, from the first step
    randomise(adapter)
    tuned = model(x)
    torch.testing.assert_close(adapter.merge()(x), tuned, rtol=1e-4, atol=1e-5)


def test_pissa_starts_from_the_largest_singular_directions() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(20, 12)).double()
    inject(layer, PiSSA(r=3, alpha=6, targets="0", niter=0), head=False)
    a, b = (layer.state_dict()[f"0.{SLOT}.default_pissa.start_{m}"] for m in "ab")
    u, s, vh = torch.linalg.svd(layer[0].weight, full_matrices=False)
    torch.testing.assert_close(2 * b @ a, u[:, :3] * s[:3] @ vh[:3], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_fits_the_clean_base_exactly(method: str, build: Build, tmp_path: Path) -> None:
    example = build("bert")
    adapter = inject(example.model, METHODS[method](targets="query"))
    example.train(adapter.parameters())
    adapter.save(tmp_path / "adapter")
    torch.manual_seed(5)  # another decomposition must not matter
    other = build("bert")
    load_adapter(other.model, tmp_path / "adapter")
    assert torch.equal(other.logits(), example.logits())


@pytest.mark.parametrize("method", ["pissa", "olora"])  # peft computes LoftQ's start on GPUs alone
@pytest.mark.parametrize(("name", "targets"), [("bert", "query"), ("llama", "q_proj")])
def test_outputs_and_gradients_equal_pefts(
    method: str, name: str, targets: str, build: Build
) -> None:
    example = build(name)
    weights = {n: w.double() for n, w in example.model.state_dict().items()}
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=[targets], init_lora_weights=method)
    reference = peft.get_peft_model(copy.deepcopy(example.model), config).double().eval()
    settings = {"niter": 0} if method == "pissa" else {}
    adapter = inject(
        example.model, METHODS[method](r=4, alpha=6, targets=targets, **settings), head=False
    )
    example.model.double()
    pairs = []
    with torch.no_grad():
        for host, _, delta in adapter.deltas:
            theirs = reference.get_submodule(f"base_model.model.{host}")
            a, b = (getattr(theirs, f"lora_{m}").default.weight for m in "AB")
            ours = delta.start_b.double() @ delta.start_a.double()
            torch.testing.assert_close(ours, b @ a, rtol=1e-4, atol=1e-5)
            # peft takes it out of the weight in single precision, which we make double.
            theirs.base_layer.weight.copy_(weights[f"{host}.weight"] - 1.5 * b @ a)
            delta.start_a.copy_(a), delta.start_b.copy_(b)
            pairs += [(delta.lora_A, a), (delta.lora_B, b)]
        for parameter, other in pairs:
            parameter.copy_(other.add_(torch.randn_like(other), alpha=0.1))
    assert len(pairs) == 4
    output, expected = example.output(), example.output(reference)
    torch.testing.assert_close(output, expected, rtol=1e-7, atol=1e-12)
    for each in (output, expected):
        each.square().mean().backward()
    for parameter, other in pairs:
        scale = other.grad.abs().max()
        assert (parameter.grad - other.grad).abs().max() <= 1e-7 * scale


@pytest.mark.parametrize("method", METHODS)
def test_a_model_without_values_is_refused(method: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 5))
    with pytest.raises(AdapterError, match="fill the model first, then inject"):
        inject(model, METHODS[method](targets="0"), head=False)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="`niter` must be 0 or more, but is -1 instead"):
        PiSSA(niter=-1)
    with pytest.raises(ConfigError, match="`r` must be at least 1, but is 0 instead"):
        OLoRA(r=0)
