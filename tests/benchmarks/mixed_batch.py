"""A batch of several adapters beside a batch of one, and beside peft's `adapter_names`.

Every variant runs copies of one model in one process and takes turns, so that whatever else the
machine does meets all alike; the ratios of the medians are what counts. Run it with

    python tests/benchmarks/mixed_batch.py

and see `README.md` beside it for what was measured.
"""

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lora_step import times
from torch import Tensor, nn

from lightning_peft import LoRA, inject, mixed, switch
from lightning_peft.structure import anatomy

ROWS = 32
RANK = 8
NAMES = tuple("abcdefgh")


def base() -> nn.Module:
    """Return MiniLM's shape under a classifier."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


def batch_of(tokens: int) -> dict[str, Tensor]:
    """Return 32 texts of a length."""
    return {
        "input_ids": torch.randint(1000, 30000, (ROWS, tokens)),
        "attention_mask": torch.ones(ROWS, tokens, dtype=torch.long),
        "labels": torch.randint(0, 2, (ROWS,)),
    }


def ours(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """Return the model with our LoRA of each name on all linear layers of its stack."""
    adapters = [inject(model, LoRA(r=RANK), name, head=False) for name in names]
    for adapter in adapters:
        fill(adapter.requires_grad_().parameters())
    return model


def theirs(model: nn.Module, names: Sequence[str]) -> Any:
    """Return the model with peft's LoRA of each name on the same layers."""
    import peft

    targets = [name for name, _ in anatomy.projections(model)]
    config = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=targets)
    wrapped = peft.get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    lora = [p for n, p in wrapped.named_parameters() if "lora_" in n]
    for parameter in lora:
        parameter.requires_grad_(True)
    fill(lora)
    return wrapped


def fill(parameters: Sequence[nn.Parameter]) -> None:
    """Give parameters values other than zero."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.02)


def steps(tokens: int, train: bool) -> dict[str, Callable[[], None]]:
    """Return a run of one batch by each variant: a forward pass, in training with the backward."""
    model, batch = base(), batch_of(tokens)
    rows = [NAMES[i % len(NAMES)] for i in range(ROWS)]
    bare = copy.deepcopy(model).requires_grad_(False)
    one, several = ours(copy.deepcopy(model), NAMES[:1]), ours(copy.deepcopy(model), NAMES)
    rival = theirs(copy.deepcopy(model), NAMES)

    def run(called: Callable[[], Any]) -> None:
        with torch.set_grad_enabled(train):
            loss = called().loss
            if loss.requires_grad:
                loss.backward()

    def mix() -> None:
        with mixed(several, rows):
            run(lambda: several(**batch))

    for each in (bare, one, several):
        each.train(train)
    rival.eval()  # it mixes in eval mode alone; nothing here drops out
    return {
        "base": lambda: run(lambda: bare(**batch)),
        "one": lambda: run(lambda: one(**batch)),
        "mixed": mix,
        "peft": lambda: run(lambda: rival(**batch, adapter_names=rows)),
    }


def row(tokens: int, train: bool, rounds: int) -> str:
    """Measure one workload and return its row of the table."""
    variants = steps(tokens, train)
    median = dict(zip(variants, times(list(variants.values()), rounds), strict=True))
    shown = " | ".join(f"{1000 * median[name]:.0f} ms" for name in ("base", "one", "mixed", "peft"))
    kind = "training" if train else "inference"
    return (
        f"| {ROWS} × {tokens}, {kind} | {shown} | {median['mixed'] / median['one']:.2f} "
        f"| {median['mixed'] / median['peft']:.2f} |"
    )


def microseconds(action: Callable[[], Any], rounds: int = 200) -> float:
    """Return the median time of an action."""
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        action()
        taken.append(time.perf_counter() - start)
    return 1e6 * statistics.median(taken)


def switching() -> str:
    """Measure what it takes to exchange one adapter for another, and to begin a mixed batch."""
    several, rival = ours(base(), NAMES), theirs(base(), NAMES)
    rows, turn = [NAMES[i % len(NAMES)] for i in range(ROWS)], iter(range(10**6))
    switch(several, "a")

    def begin() -> None:
        with mixed(several, rows):
            pass

    mine = microseconds(lambda: switch(several, NAMES[next(turn) % 2]))
    other = microseconds(lambda: rival.set_adapter(NAMES[next(turn) % 2]))
    entering = microseconds(begin)
    return (
        f"`switch` {mine:.0f} µs, peft's `set_adapter` {other:.0f} µs; "
        f"`mixed` begins and ends in {entering:.0f} µs"
    )


def memory() -> str:
    """Return what four adapters take on one base, in bytes of distinct storages."""
    model = base()
    bare = held(model)
    ours(model, NAMES[:4])
    return f"base {bare / 1e6:.1f} MB, with four adapters {held(model) / 1e6:.1f} MB"


def held(model: nn.Module) -> int:
    """Return the bytes of the distinct storages of a model's tensors."""
    tensors = (*model.parameters(), *model.buffers())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="measured runs of each")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    settings: Any = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {settings.threads} thread(s), r = {RANK}, fp32\n")
    print("| batch | base | one adapter | 8 mixed | peft mixed | mixed / one | mixed / peft |")
    print("|---|---|---|---|---|---|---|")
    for tokens in (128, 64):
        for train in (False, True):
            print(row(tokens, train, settings.rounds), flush=True)
    print(f"\n{switching()}\n{memory()}")


if __name__ == "__main__":
    main()
