"""One training of `sst2.py`: a contender, a learning rate, a seed. Its last line is JSON.

Runs where adapters lives too, whose transformers is older and where lightning_peft is not.
"""

import json
import platform
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sst2_rivals import Batch, Contender, by_adapters, by_peft
from torch import Tensor, nn

BATCH, WARMUP = 16, 0.06
POOL = 32 * BATCH
"""Rows that are sorted by length at a time."""
Row = tuple[Tensor, int]


def main() -> None:
    run = json.loads(sys.argv[1])
    torch.set_num_threads(1)  # more would spend CPU time on waiting for each other
    data = rows(run, "train")[: run["rows"]]
    torch.manual_seed(run["seed"])
    contender = made(run, steps_of(data))
    start = time.process_time()  # of the CPU, so that other work on the machine does not count
    train(contender, data, run["seed"])
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found = {
        "scores": {split: scores(contender.model, rows(run, split)) for split in run["splits"]},
        "trained": sum(p.numel() for p in contender.model.parameters() if p.requires_grad),
        "seconds": round(seconds, 1),
        "peak_mb": round(peak),
        "bytes": saved_bytes(contender.save),
        "machine": machine(),
        "versions": {name: version(name) for name in packages(run["who"])},
    }
    print(json.dumps(found))


def made(run: dict[str, Any], steps: int) -> Contender:
    """Return MiniLM with a method injected by whose turn it is."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(run["base"], num_labels=2)
    if run["who"] == "ours":
        return by_us(run, model)

    def rates(tuned: nn.Module, factor: float) -> list[dict[str, Any]]:
        return groups(tuned, run["optimizer"], factor)

    make = by_peft if run["who"] == "peft" else by_adapters
    return make(model, run["method"], steps, rates)


def by_us(run: dict[str, Any], model: nn.Module) -> Contender:
    """Return the method of a YAML of ours, as a loop of one's own trains it."""
    from lightning_peft import inject
    from lightning_peft.config import instantiate
    from lightning_peft.training import steps
    from lightning_peft.training.warm_start import starts_from_data, warm_start

    adapter = inject(model, [instantiate(spec) for spec in run["settings"].values()])
    rates = {name: run["optimizer"][name] for name in ("lr", "weight_decay", "head_lr")}

    def start(batches: list[Batch]) -> None:
        if starts_from_data(adapter):
            with torch.no_grad(), warm_start(adapter, batches[0]["attention_mask"]):
                model(**batches[0])

    return Contender(
        model=model,
        save=adapter.save,
        groups=adapter.parameter_groups(**rates),
        start=start,
        before_step=lambda step, last: steps.before_step(adapter, step, last),
        after_step=lambda optimizer, step, last: steps.after_step(adapter, optimizer, step, last),
    )


def groups(model: nn.Module, optimizer: dict[str, Any], factor: float) -> list[dict[str, Any]]:
    """Group a rival's parameters as ours are: by rate and by whether the weight decays.

    Args:
        model: the rival's.
        optimizer: `lr`, `weight_decay` and `head_lr`, which may be None.
        factor: how many times faster than A the B of LoRA learns.
    """
    lr, found = optimizer["lr"], dict[tuple[float, float], list[nn.Parameter]]()
    for name, parameter in model.named_parameters():
        rate = (optimizer["head_lr"] or lr) if "classifier" in name else lr
        rate *= factor if "lora_B" in name else 1.0
        decay = optimizer["weight_decay"] if parameter.dim() > 1 else 0.0
        if parameter.requires_grad:
            found.setdefault((rate, decay), []).append(parameter)
    return [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in found.items()]


def train(contender: Contender, data: list[Row], seed: int) -> None:
    """One epoch of AdamW, the learning rates rising and then falling along a cosine."""
    from transformers import get_cosine_schedule_with_warmup

    model, steps = contender.model, steps_of(data)
    optimizer = torch.optim.AdamW(contender.groups)
    trained = [p for group in contender.groups for p in group["params"]]
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARMUP * steps), steps)
    ordered = of_like_lengths(data, torch.Generator().manual_seed(seed))
    model.train()
    contender.start([inputs for inputs, _ in batches(ordered[: 4 * BATCH])])
    for step, (inputs, labels) in enumerate(batches(ordered)):
        model(**inputs, labels=labels).loss.backward()
        contender.before_step(step, steps)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        contender.after_step(optimizer, step, steps)
        optimizer.zero_grad()
        schedule.step()


def steps_of(data: list[Row]) -> int:
    """Return how many optimizer steps an epoch has."""
    return -(-len(data) // BATCH)


def of_like_lengths(data: list[Row], order: torch.Generator) -> list[Row]:
    """Return the rows shuffled, in batches that need half the padding of random ones."""
    shuffled = [data[i] for i in torch.randperm(len(data), generator=order).tolist()]
    pools = [shuffled[i : i + POOL] for i in range(0, len(data), POOL)]
    ordered = [row for pool in pools for row in sorted(pool, key=lambda row: len(row[0]))]
    starts = torch.randperm(steps_of(data), generator=order).tolist()
    full = sorted(starts, key=lambda start: (start + 1) * BATCH > len(data))  # the short one last
    return [row for start in full for row in ordered[start * BATCH : (start + 1) * BATCH]]


@torch.no_grad()
def scores(model: nn.Module, data: list[Row]) -> dict[str, float]:
    """Return the share of right answers and the mean loss."""
    model.eval()
    right, loss = 0, 0.0
    for inputs, labels in batches(sorted(data, key=lambda row: len(row[0]))):
        logits = model(**inputs).logits
        right += int((logits.argmax(-1) == labels).sum())
        loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
    return {"accuracy": right / len(data), "loss": loss / len(data)}


def batches(data: list[Row]) -> Iterator[tuple[Batch, Tensor]]:
    for start in range(0, len(data), BATCH):
        part = data[start : start + BATCH]
        ids = nn.utils.rnn.pad_sequence([row for row, _ in part], batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(r) for r, _ in part], batch_first=True)
        yield {"input_ids": ids, "attention_mask": mask}, torch.tensor([y for _, y in part])


def rows(run: dict[str, Any], split: str) -> list[Row]:
    """Return the token ids and the label of each sentence."""
    from transformers import AutoTokenizer

    text = (Path(run["data"]) / f"{split}.tsv").read_text("utf-8")
    lines = [line.split("\t") for line in text.splitlines()]
    encoded = AutoTokenizer.from_pretrained(run["base"])(
        [text for text, _ in lines], truncation=True, max_length=128
    )
    ids = encoded["input_ids"]
    return [(torch.tensor(i), int(label)) for i, (_, label) in zip(ids, lines, strict=True)]


def saved_bytes(save: Callable[[Path], object]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "adapter")
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def packages(who: str) -> list[str]:
    return ["torch", "transformers", *([who] if who != "ours" else [])]


def machine() -> str:
    """Return the processor's name and the widest of the instructions that matter here."""
    known = Path("/proc/cpuinfo")
    text = known.read_text("utf-8") if known.exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    wide = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in text]
    return " ".join([names[0] if names else platform.machine(), *wide[:1]])


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # peft's and transformers' own
    main()
