"""A LoRA step beside peft's: time, and bytes that autograd keeps for backward.

Both tune copies of one model in one process and take turns, so that whatever else the machine does
meets both alike; the ratio of the medians is what counts. Run it with

    python tests/benchmarks/lora_step.py

and see `README.md` beside it for what was measured.
"""

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import LoRA, inject

RANK = 16


@dataclass(frozen=True)
class Workload:
    """A model and one batch for it."""

    name: str
    model: nn.Module
    batch: dict[str, Tensor]


def encoder(rows: int = 32, tokens: int = 128) -> Workload:
    """Return MiniLM's shape under a classifier, and texts for it."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    batch = {
        "input_ids": torch.randint(1000, 30000, (rows, tokens)),
        "attention_mask": torch.ones(rows, tokens, dtype=torch.long),
        "labels": torch.randint(0, 2, (rows,)),
    }
    return Workload(f"MiniLM, {rows} × {tokens}", BertForSequenceClassification(config), batch)


def decoder() -> Workload:
    """Return four layers of SmolLM2-135M's shape, one text of 1,024 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    ids = torch.randint(0, 49152, (1, 1024))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.5, -100)
    return Workload(
        "SmolLM2 shape, 4 layers, 1,024 tokens",
        LlamaForCausalLM(config),
        {"input_ids": ids, "labels": labels},
    )


def ours(model: nn.Module, dropout: float) -> nn.Module:
    """Return the model with our LoRA on all linear layers of its layer stack."""
    inject(model, LoRA(r=RANK, dropout=dropout), head=False)
    return model


def theirs(model: nn.Module, dropout: float) -> nn.Module:
    """Return the model with peft's LoRA on the same layers."""
    import peft

    from lightning_peft.structure import anatomy

    targets = [name for name, _ in anatomy.projections(model)]
    config = peft.LoraConfig(r=RANK, lora_alpha=16, lora_dropout=dropout, target_modules=targets)
    return peft.get_peft_model(model, config)


def step_of(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], None]:
    """Return a function that takes one optimizer step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    return step


def saved_bytes(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Return the bytes of the storages that autograd keeps for backward, parameters excluded."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        dense = [tensor._indices(), tensor._values()] if tensor.is_sparse else [tensor]
        for part in dense:
            storage = part.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes(), part
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    total = sum(size for size, _ in kept.values())
    loss.backward()
    return total


def times(steps: list[Callable[[], None]], rounds: int) -> list[float]:
    """Return the median seconds of each step; the steps take turns, in changing order.

    One thread's are the CPU's, so that other work on the machine counts less.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    taken: list[list[float]] = [[] for _ in steps]
    for turn in range(rounds + 2):
        order = range(len(steps)) if turn % 2 else reversed(range(len(steps)))
        for i in order:
            start = clock()
            steps[i]()
            if turn >= 2:  # the first two warm up
                taken[i].append(clock() - start)
    return [statistics.median(seconds) for seconds in taken]


def row(workload: Workload, dropout: float, rounds: int) -> str:
    """Measure one workload and return its row of the table."""
    models = [make(copy.deepcopy(workload.model), dropout) for make in (ours, theirs)]
    counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in models]
    if counts[0] != counts[1]:
        raise RuntimeError(f"Both must train as much, but train {counts} parameters instead.")
    mine, other = times([step_of(m, workload.batch) for m in models], rounds)
    my_bytes, other_bytes = (saved_bytes(m, workload.batch) for m in models)
    return (
        f"| {workload.name} | {dropout} | {1000 * mine:.0f} ms | {1000 * other:.0f} ms "
        f"| {mine / other:.3f} | {my_bytes / 1e6:.1f} MB | {other_bytes / 1e6:.1f} MB "
        f"| {my_bytes / other_bytes:.3f} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=11, help="measured steps of each")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    settings: Any = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {settings.threads} thread(s), r = {RANK}, fp32\n")
    print("| workload | dropout | time | peft | ratio | saved | peft | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for make in (encoder, decoder):
        workload = make()
        for dropout in (0.0, 0.05):
            print(row(workload, dropout, settings.rounds), flush=True)


if __name__ == "__main__":
    main()
