"""The recipes MAM and UniPELT as a whole compute what adapters 1.3 computes: outputs, gradients."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from lightning_peft import inject
from lightning_peft.config import instantiate
from lightning_peft.delta import SLOT
from tests.methods.adapters_oracle import IDS, model_of, stored
from tests.oracles.filling import values

CONFIGURATIONS = Path(__file__).parents[2] / "conf" / "method"
PREFIX = {"tokens": 5, "bottleneck": 6}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "mam": {"prefix": PREFIX, "bottleneck": {"size": 8}},
    "unipelt": {
        "gated_lora": {"r": 3, "gating": "sequence", "targets": ["query", "value"]},
        "prefix": PREFIX | {"gating": "sequence"},
        "bottleneck": {"size": 8, "gating": "sequence"},
    },
}
SECOND = "prefix.control_trans.2."


def recipe(case: str) -> list[Any]:
    """Return the methods that the file sets, with what the oracle has otherwise."""
    text = (CONFIGURATIONS / f"{case}.yaml").read_text(encoding="utf-8")
    methods = [instantiate(spec) for spec in yaml.safe_load(text)["method"].values()]
    return [replace(method, **CASES[case][method.kind]) for method in methods]


def their_name(name: str) -> str:
    """Return the oracle's name of one of our parameters, or nothing where it is a part of one."""
    host, _, rest = name.partition(f"{SLOT}.default_")
    kind, _, tensor = rest.partition(".")
    index = next((part for part in host.split(".") if part.isdigit()), "")
    if kind == "gated_lora":
        return f"{index}.{host.rstrip('.').rpartition('.')[2]}.{tensor}"
    if kind == "bottleneck":
        return f"{index}.{tensor}"
    if "gate" in tensor:
        return f"{index}.prefix.{tensor}"
    trunk = {"embedding": "wte.weight", "weight": "control_trans.0.weight"}
    trunk |= {"bias": "control_trans.0.bias"}
    return f"prefix.{trunk[tensor.rpartition('.')[2]]}" if "trunks" in tensor else ""


def parts(named: dict[str, nn.Parameter], end: str) -> list[nn.Parameter]:
    """Return keys and values of the first layer, of the second, ..."""
    keys, values = ([p for n, p in named.items() if n.endswith(k + end)] for k in ("key", "value"))
    return [p for pair in zip(keys, values, strict=True) for p in pair]


def assert_equal(one: Tensor | None, other: Tensor) -> None:
    assert one is not None
    assert (one - other).abs().max() <= 1e-7 * other.abs().max()
    assert other.abs().max() > 0


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_those_of_adapters(case: str) -> None:
    expected, model = stored(f"bert-{case}"), model_of("bert")
    named = inject(model, recipe(case), head=False).named_parameters()
    own = {their_name(n): p for n, p in named.items() if their_name(n)}
    networks = {f"{SECOND}{end}": parts(named, f"_{end}") for end in ("weight", "bias")}
    assert {f"grad.{name}" for name in (*own, *networks)} == expected.keys() - {"logits"}
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(values(name, parameter.shape, 0.3))
        for name, pieces in networks.items():
            whole = values(name, expected[f"grad.{name}"].shape, 0.3)
            for piece, rows in zip(pieces, whole.chunk(len(pieces)), strict=True):
                piece.copy_(rows.view(piece.shape))

    logits = model(input_ids=IDS).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-7, atol=1e-12)
    logits.square().mean().backward()
    for name, parameter in own.items():
        assert_equal(parameter.grad, expected[f"grad.{name}"])
    for name, pieces in networks.items():
        wanted = expected[f"grad.{name}"].chunk(len(pieces))
        for piece, rows in zip(pieces, wanted, strict=True):
            assert_equal(piece.grad, rows.view(piece.shape))
