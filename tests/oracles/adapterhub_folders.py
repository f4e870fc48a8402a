"""Write folders as adapters 1.3 saves them, beside what it computes with them.

Runs in the environment that `from_adapters.py` describes:

    python tests/oracles/adapterhub_folders.py
"""

import shutil
from pathlib import Path

import adapters
import torch
import transformers
from filling import fill
from from_adapters import PLAIN, TINY
from safetensors.torch import save_file

GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
MODELS = {
    "bert": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**TINY, num_labels=3)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**TINY, num_key_value_heads=2, bos_token_id=1, eos_token_id=2)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(**T5, decoder_start_token_id=0)
    ),
}
CASES = {
    "bert-houlsby": adapters.DoubleSeqBnConfig(reduction_factor=8),
    "bert-parallel": adapters.ParBnConfig(reduction_factor=8, scaling="learned"),
    "bert-default": adapters.SeqBnConfig(reduction_factor=8),
    "llama-plain": adapters.SeqBnConfig(reduction_factor=8, leave_out=[0], **PLAIN),
    "gpt2-gated": adapters.DoubleSeqBnConfig(reduction_factor=8, use_gating=True, scaling=2.0),
    "t5-houlsby": adapters.DoubleSeqBnConfig(reduction_factor=8),
    "t5-cross": adapters.DoubleSeqBnConfig(reduction_factor=8, cross_adapter=True),
}


def write(case: str, folder: Path) -> None:
    """Save one adapter, and the logits that it gives."""
    kind = case.partition("-")[0]
    model = MODELS[kind]().eval()
    fill(dict(model.named_parameters()))
    adapters.init(model)
    model.add_adapter("first", config=CASES[case])
    model.set_active_adapters("first")
    model.eval()
    own = {n: p for n, p in model.named_parameters() if ".adapters.first." in n}
    fill(own | {n: p for n, p in model.named_parameters() if n.startswith("classifier")}, 0.5)
    ids = torch.arange(3, 24).reshape(3, 7)
    decoder = {"decoder_input_ids": ids[:, :4]} if kind == "t5" else {}
    with torch.no_grad():
        logits = model(input_ids=ids, **decoder).logits
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.save_adapter(str(folder), "first", with_head=kind == "bert", use_safetensors=True)
    save_file({"logits": logits.contiguous()}, folder / "logits.safetensors")
    print(case, sum(path.stat().st_size for path in folder.iterdir()), "bytes")


if __name__ == "__main__":
    for case in CASES:
        write(case, Path(__file__).parent / "adapterhub" / case)
