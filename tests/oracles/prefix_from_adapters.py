"""Write what prefix-tuning of adapters 1.3 computes, for the parity tests: logits and gradients.

Runs in the environment that `from_adapters.py` describes:

    python tests/oracles/prefix_from_adapters.py
"""

from pathlib import Path

import adapters
import torch
from filling import fill
from from_adapters import model_of
from safetensors.torch import save_file

CASES = {
    "prefix-flat": adapters.PrefixTuningConfig(flat=True, prefix_length=5),
    "prefix-network": adapters.PrefixTuningConfig(prefix_length=5, bottleneck_size=6),
}


def write(case: str, folder: Path) -> None:
    """Compute one case and store its logits and gradients."""
    model = model_of("bert")
    adapters.init(model)
    model.add_adapter("a", config=CASES[case])
    model.set_active_adapters("a")
    model.double()
    own = {n.partition(".a.self_prefix.")[2]: p for n, p in model.named_parameters()}
    own = {name: p for name, p in own.items() if name}
    fill(own)
    ids = torch.arange(3, 24).reshape(3, 7)
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    logits = model(input_ids=ids, attention_mask=mask).logits
    logits.square().mean().backward()
    stored = {"logits": logits.detach()} | {f"grad.{n}": p.grad for n, p in own.items()}
    save_file(stored, folder / f"adapters-bert-{case}.safetensors")
    print(case, sorted(stored))


if __name__ == "__main__":
    for case in CASES:
        write(case, Path(__file__).parent)
