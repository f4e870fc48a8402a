"""A training step of each method beside a rival's: time, and bytes kept for the backward pass.

    python tests/benchmarks/method_steps.py

What `lora_step.py` does for LoRA, for every method that peft has, with the sizes and places of
`sst2_rivals.py`: both tune copies of MiniLM's shape in one process and take turns.
"""

import argparse
import copy
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from lora_step import Workload, encoder, saved_bytes, step_of, times
from sst2_rivals import PEFT, by_peft
from torch import nn

from lightning_peft import inject
from lightning_peft.config import instantiate

CONF = Path(__file__).parents[2] / "conf" / "method"


def ours(model: nn.Module, method: str) -> nn.Module:
    """Return the model with a method as its YAML sets it."""
    config = yaml.safe_load((CONF / f"{method}.yaml").read_text("utf-8"))
    inject(model, [instantiate(spec) for spec in config["method"].values()])
    return model


def row(workload: Workload, method: str, rounds: int) -> str:
    """Measure one method and return its row of the table."""
    theirs = by_peft(copy.deepcopy(workload.model), method, 1000, lambda *_: [])
    models = [ours(copy.deepcopy(workload.model), method), theirs.model]
    mine, other = times([step_of(model, workload.batch) for model in models], rounds)
    my_bytes, other_bytes = (saved_bytes(model, workload.batch) for model in models)
    return (
        f"| {method} | {1000 * mine:.0f} ms | {1000 * other:.0f} ms | {mine / other:.2f} "
        f"| {my_bytes / 1e6:.0f} MB | {other_bytes / 1e6:.0f} MB | {my_bytes / other_bytes:.2f} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=sorted(PEFT), default=sorted(PEFT))
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each")
    settings: Any = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    workload = encoder(rows=16, tokens=64)
    print("| method | time | peft | ratio | saved | peft | ratio |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for method in settings.methods:
        print(row(workload, method, settings.rounds), flush=True)


if __name__ == "__main__":
    main()
