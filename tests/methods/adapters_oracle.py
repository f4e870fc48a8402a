"""The models of `tests/oracles/from_adapters.py` in this version of transformers."""

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from tests.oracles.filling import fill

FOLDER = Path(__file__).parents[1] / "oracles"
TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
IDS = torch.arange(3, 24).reshape(3, 7)


def stored(case: str) -> dict[str, Tensor]:
    """Return what adapters computed: logits, gradients, and rotations where there are some."""
    return load_file(FOLDER / f"adapters-{case}.safetensors")


def model_of(kind: str) -> Any:
    """Return the tiny model with filled weights that the oracle started from."""
    if kind == "bert":
        config: Any = transformers.BertConfig(
            **TINY, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        model: Any = transformers.BertForSequenceClassification(config)
    else:
        config = transformers.LlamaConfig(
            **TINY, num_key_value_heads=2, bos_token_id=1, eos_token_id=2
        )
        model = transformers.LlamaForCausalLM(config)
    model = model.double().eval()
    fill(dict(model.named_parameters()))
    return model
