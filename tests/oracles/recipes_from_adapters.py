"""Write what the recipes MAM and UniPELT of adapters 1.3 compute, for the parity tests.

Runs in the environment that `from_adapters.py` describes:

    python tests/oracles/recipes_from_adapters.py
"""

import re
from pathlib import Path

import adapters
import torch
from filling import fill
from from_adapters import model_of
from safetensors.torch import save_file
from torch import nn

PREFIX = adapters.PrefixTuningConfig(prefix_length=5, bottleneck_size=6)
CASES = {
    "mam": adapters.MAMConfig(PREFIX, adapters.ParBnConfig(reduction_factor=4)),
    "unipelt": adapters.UniPELTConfig(
        PREFIX,
        adapters.SeqBnConfig(reduction_factor=4, original_ln_before=False, residual_before_ln=True),
        adapters.LoRAConfig(r=3, alpha=2, attn_matrices=["q", "v"]),
    ),
}
NAMES = [
    (r".*layer\.(\d)\.attention\.self\.(query|value)\.loras\.a\.(lora_A|lora_B)", r"\1.\2.\3"),
    (r".*layer\.(\d)\.attention\.self\.(query|value)\.loras\.a\.gate\.weight", r"\1.\2.gate"),
    (r".*layer\.(\d)\.attention\.self\.(query|value)\.loras\.a\.gate\.bias", r"\1.\2.gate_bias"),
    (r".*layer\.(\d)\..*prefix_gates\.a\.weight", r"\1.prefix.gate"),
    (r".*layer\.(\d)\..*prefix_gates\.a\.bias", r"\1.prefix.gate_bias"),
    (r".*prefix_tunings\.a\.self_prefix\.(.*)", r"prefix.\1"),
    (r".*layer\.(\d)\..*adapter_(down|up)\.(?:0\.)?weight", r"\1.\2"),
    (r".*layer\.(\d)\..*adapter_(down|up)\.(?:0\.)?bias", r"\1.\2_bias"),
    (r".*layer\.(\d)\..*adapters\.a\.gate\.weight", r"\1.gate"),
    (r".*layer\.(\d)\..*adapters\.a\.gate\.bias", r"\1.gate_bias"),
]


def short(name: str) -> str:
    """Return our short name of a trained tensor of adapters, or nothing."""
    fits = ((re.fullmatch(old, name), new) for old, new in NAMES)
    return next((match.expand(new) for match, new in fits if match), "")


def write(case: str, folder: Path) -> None:
    """Compute one case and store its logits and gradients."""
    model: nn.Module = model_of("bert")
    adapters.init(model)
    model.add_adapter("a", config=CASES[case])
    model.set_active_adapters("a")
    model.double().eval()
    own = {short(n): p for n, p in model.named_parameters() if short(n)}
    trained = [n for n, p in model.named_parameters() if ".a." in n]
    assert len(own) == len(trained), set(trained)
    fill(own)
    logits = model(input_ids=torch.arange(3, 24).reshape(3, 7)).logits
    logits.square().mean().backward()
    stored = {"logits": logits.detach()} | {f"grad.{n}": p.grad for n, p in own.items()}
    save_file(stored, folder / f"adapters-bert-{case}.safetensors")
    print(case, sorted(stored))


if __name__ == "__main__":
    for case in CASES:
        write(case, Path(__file__).parent)
