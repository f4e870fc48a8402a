"""Write what adapters 1.3 computes, for the parity tests: logits and gradients.

adapters pins transformers 4.57, so this runs in an environment of its own:

    pip install torch==2.13.0 && pip install adapters==1.3.0 safetensors
    python tests/oracles/from_adapters.py

Weights are not stored: `filling.py` makes them from their names, here and in the tests.
"""

import re
from pathlib import Path

import adapters
import torch
import transformers
from filling import fill  # this folder is on the path of a script
from safetensors.torch import save_file
from torch import Tensor, nn

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
PLAIN = {"original_ln_before": False, "residual_before_ln": True}
CASES = {
    "bert-pfeiffer": adapters.SeqBnConfig(reduction_factor=4, **PLAIN),
    "bert-houlsby": adapters.DoubleSeqBnConfig(reduction_factor=8),
    "bert-parallel": adapters.ParBnConfig(reduction_factor=4),
    "bert-learned-scaling": adapters.ParBnConfig(reduction_factor=4, scaling="learned"),
    "bert-layer-norm": adapters.SeqBnConfig(reduction_factor=4, ln_before=True, **PLAIN),
    "bert-gated": adapters.SeqBnConfig(reduction_factor=4, use_gating=True, **PLAIN),
    "bert-leave-out": adapters.SeqBnConfig(reduction_factor=4, leave_out=[0], **PLAIN),
    "llama-pfeiffer": adapters.SeqBnConfig(reduction_factor=4, **PLAIN),
    "llama-houlsby": adapters.DoubleSeqBnConfig(reduction_factor=8),
    "bert-loreft": adapters.LoReftConfig(r=3, prefix_positions=2, suffix_positions=2),
    "bert-loreft-tied": adapters.LoReftConfig(
        r=3, prefix_positions=2, suffix_positions=1, tied_weights=True
    ),
    "llama-loreft": adapters.LoReftConfig(r=3, prefix_positions=3, suffix_positions=1),
}
NAMES = [
    (r"adapter_down\.(0|1)\.weight", "down"),
    (r"adapter_down\.(0|1)\.bias", "down_bias"),
    (r"adapter_norm_before\.weight", "norm"),
    (r"adapter_norm_before\.bias", "norm_bias"),
    (r"adapter_up\.weight", "up"),
    (r"adapter_up\.bias", "up_bias"),
    (r"gate\.weight", "gate"),
    (r"gate\.bias", "gate_bias"),
    (r"scaling", "scale"),
]


def short(name: str) -> str:
    """Return `<number of the layer>.<sub-layer>.<tensor>` for a trained tensor of adapters."""
    index = re.search(r"\.(\d+)\.", name).group(1)
    if "reft" in name:
        unit = re.search(r"units\.(\d)", name).group(1)
        tensor = "R" if "projection" in name else "W" if name.endswith("weight") else "b"
        return f"{index}.{unit}.{tensor}"
    place = "attention" if "attention" in name else "feed-forward"
    return f"{index}.{place}.{next(to for old, to in NAMES if re.search(old + '$', name))}"


def model_of(kind: str) -> nn.Module:
    """Return a tiny model with filled weights."""
    if kind == "bert":
        config = transformers.BertConfig(
            **TINY, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        model = transformers.BertForSequenceClassification(config)
    else:
        config = transformers.LlamaConfig(
            **TINY, num_key_value_heads=2, bos_token_id=1, eos_token_id=2
        )
        model = transformers.LlamaForCausalLM(config)
    model = model.double().eval()
    fill(dict(model.named_parameters()))
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the adapter's own tensors, each once: a LayerNorm is registered twice."""
    named = {}
    for name, parameter in model.named_parameters():
        if re.search(r"adapters\.a\.|refts\.a\.", name):
            named[short(name)] = parameter
    return named


def write(case: str, folder: Path) -> None:
    """Compute one case and store its logits and gradients."""
    model = model_of(case.partition("-")[0])
    adapters.init(model)
    model.add_adapter("a", config=CASES[case])
    model.set_active_adapters("a")
    model.double().eval()
    own = trained(model)
    projections = [m for m in model.modules() if type(m).__name__ == "ReftUnit" and m.orthogonal]
    fill({n: p for n, p in own.items() if not (projections and n.endswith(".R"))})
    for unit in projections:  # what is parametrised takes the value of the whole
        random = torch.randn(unit.projection.weight.T.shape, dtype=torch.float64)
        unit.projection.weight = torch.linalg.qr(random).Q.T
    stored: dict[str, Tensor] = {}
    ids = torch.arange(3, 24).reshape(3, 7)
    logits = model(input_ids=ids).logits
    logits.square().mean().backward()
    stored["logits"] = logits.detach()
    stored |= {f"grad.{name}": p.grad for name, p in own.items() if p.grad is not None}
    if projections:
        names = [n for n in own if n.endswith(".R")]
        stored |= {
            f"R.{n.removesuffix('.R')}": m.projection.weight.detach().contiguous()
            for n, m in zip(names, projections, strict=True)
        }
        stored = {n: t for n, t in stored.items() if not n.endswith(".R")}
    save_file(stored, folder / f"adapters-{case}.safetensors")
    size = (folder / f"adapters-{case}.safetensors").stat().st_size
    print(f"{case}: {size / 1000:.1f} kB, {sorted(stored)[:3]} ...")


if __name__ == "__main__":
    torch.manual_seed(0)
    for case in CASES:
        write(case, Path(__file__).parent)
