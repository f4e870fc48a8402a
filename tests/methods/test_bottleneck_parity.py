"""Bottleneck adapters compute what adapters 1.3 computes: outputs and gradients."""

from typing import Any

import pytest
import torch

from lightning_peft import inject
from lightning_peft.delta import SLOT
from lightning_peft.methods.bottleneck import BottleneckAdapter
from tests.methods.adapters_oracle import IDS, model_of, stored
from tests.oracles.filling import fill

HOULSBY = {"placement": "houlsby", "activation": "silu", "size": 4}
PARALLEL = {"placement": "parallel", "size": 8}
CASES: dict[str, dict[str, Any]] = {
    "bert-pfeiffer": {"size": 8},
    "bert-houlsby": HOULSBY,
    "bert-parallel": PARALLEL | {"scaling": 4.0},
    "bert-learned-scaling": PARALLEL | {"scaling": "learned"},
    "bert-layer-norm": {"size": 8, "layer_norm": True},
    "bert-gated": {"size": 8, "gating": "sequence"},
    "bert-leave-out": {"size": 8, "leave_out": 1},
    "llama-pfeiffer": {"size": 8},
    "llama-houlsby": HOULSBY,
}


def their_name(name: str) -> str:
    """Return the oracle's name of one of our parameters."""
    host, _, tensor = name.partition(f".{SLOT}.default_bottleneck.")
    index = next(part for part in host.split(".") if part.isdigit())
    place = "attention" if "attention" in host or "attn" in host else "feed-forward"
    return f"{index}.{place}.{tensor}"


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_those_of_adapters(case: str) -> None:
    expected = stored(case)
    model = model_of(case.partition("-")[0])
    adapter = inject(model, BottleneckAdapter(**CASES[case]), head=False)
    own = {their_name(n): p for n, p in adapter.named_parameters().items()}
    assert {f"grad.{name}" for name in own} == expected.keys() - {"logits"}
    fill(own)

    logits = model(input_ids=IDS).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-7, atol=1e-12)
    logits.square().mean().backward()
    for name, parameter in own.items():
        wanted = expected[f"grad.{name}"]
        assert parameter.grad is not None
        scale = wanted.abs().max()
        assert scale > 0
        assert (parameter.grad - wanted).abs().max() <= 1e-7 * scale, name
