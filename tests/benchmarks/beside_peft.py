"""A finished run beside the same method done with peft in a plain loop.

    .venv/bin/lightning-peft experiment=ner_conll2003 folder=runs/ner
    .venv/bin/python tests/benchmarks/beside_peft.py runs/ner

Takes base, data, task, batches, epochs, learning rates and their course from the run, and the
places that LoRA or DoRA stand in from ours; the rest is peft's. A plain PyTorch loop trains, the
epoch that is best on validation is kept, and the task's own metrics judge it on the test rows. The
seconds are the CPU's, those of the run the clock's. Prints a Markdown table. A comparison is
written beside the run's report (`peft.json`) and not run again. For tasks that generate text it
compares the loss, since peft's run writes no samples.
"""

import copy
import functools
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft.config import instantiate
from lightning_peft.data.rows import RowData
from lightning_peft.jobs.fit import build, parts
from lightning_peft.jobs.judging import has_split
from lightning_peft.jobs.saved import read
from lightning_peft.module import PEFTModule
from lightning_peft.tasks.task import Task
from lightning_peft.training.schedule import warmup_decay

TASK_TYPES = {
    "sequence_classification": "SEQ_CLS",
    "named_entities": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
    "chat": "CAUSAL_LM",
    "summarisation": "CAUSAL_LM",
}
"""What peft calls the tasks in which its prompts and prefixes have a place."""


def main() -> None:
    print("| run | by | method | validation | test | trained | seconds |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: |")
    for folder in map(Path, sys.argv[1:]):
        report = json.loads((folder / "report.json").read_text("utf-8"))
        own, file = report["results"][-1], folder / "peft.json"
        if not file.exists():
            file.write_text(json.dumps(rival(read(folder))), "utf-8")
        theirs = json.loads(file.read_text("utf-8"))
        for who, found in (("ours", own), ("peft", theirs)):
            print(row(folder.name, who, found, theirs["metric"]), flush=True)


def row(run: str, who: str, found: dict[str, Any], metric: str) -> str:
    scores = [f"{found[split].get(metric, float('nan')):.3f}" for split in ("validation", "test")]
    cells = [run, who, found["name"], *scores, f"{found['trained']:,}", f"{found['seconds']:.0f}"]
    return f"| {' | '.join(cells)} |"


def rival(settings: dict[str, Any]) -> dict[str, Any]:
    """Train peft's counterpart of a run's method with the run's settings, and judge it."""
    torch.manual_seed(settings["seed"])
    ours, _ = build(settings)
    source, data, task = parts(settings)
    model = wrapped(settings, task, task.load_model(source), ours)
    data.setup("fit")
    start = time.process_time()
    best, validation = fitted(settings, task, model, data)
    seconds = time.process_time() - start
    model.load_state_dict(best, strict=False)
    test = {}
    if has_split(data, "test"):
        data.setup("test")
        test = scores(task, model, data.test_dataloader())
    return {
        "name": method_of(model),
        "metric": task.metric if task.metric in validation else "loss",
        "validation": validation,
        "test": test,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds": seconds,
    }


def wrapped(settings: dict[str, Any], task: Task, model: nn.Module, ours: PEFTModule) -> nn.Module:
    """Return the base in peft's hands, with the targets, the rank and the head that ours has."""
    import peft

    (method,) = instantiate(settings["method"], "method").values()
    places = sorted({host for host, _, _ in ours.adapter.deltas})
    trained = sorted({name.rpartition(".")[0] for name in ours.adapter.in_place})
    beside: dict[str, Any] = {"modules_to_save": trained} if trained else {}
    kind = TASK_TYPES.get(Path(sys.modules[type(task).__module__].__file__ or "").stem)
    configs: dict[str, Any] = {
        "lora": lambda: peft.LoraConfig(
            r=method.r, lora_alpha=method.alpha, lora_dropout=method.dropout, **placed
        ),
        "dora": lambda: peft.LoraConfig(
            r=method.r, lora_alpha=method.alpha, use_dora=True, **placed
        ),
        "prefix": lambda: peft.PrefixTuningConfig(
            num_virtual_tokens=method.tokens, task_type=kind, **beside
        ),
        "prompt": lambda: peft.PromptTuningConfig(
            num_virtual_tokens=method.tokens, task_type=kind, **beside
        ),
    }
    placed = {"target_modules": places, **beside}
    tuned = peft.get_peft_model(model, configs[method.kind]())
    for name, module in tuned.named_modules():
        module.training = ".lora_dropout." in name  # all else in the mode that it came with
    return tuned


def method_of(model: Any) -> str:
    return str(model.peft_config["default"].peft_type.value)


def fitted(
    settings: dict[str, Any], task: Task, model: nn.Module, data: RowData
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Train as many epochs as the run did, and return the best one's state and its metrics."""
    loader, optimizer = data.train_dataloader(), optimizer_of(settings, model)
    epochs = settings["trainer"]["max_epochs"]
    steps = epochs * len(loader)
    share, course = settings["optimizer"]["warmup"], settings["optimizer"]["schedule"]
    factor = functools.partial(
        warmup_decay, steps=steps, warmup=round(share * steps), course=course
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    monitor, sign = task.monitor.rpartition("/")[2], 1 if task.mode == "max" else -1
    kept: list[tuple[float, dict[str, torch.Tensor], dict[str, float]]] = []
    for epoch in range(epochs):
        set_epoch(loader, epoch)
        for batch in loader:
            optimizer.zero_grad()
            task.step(model, batch).loss.backward()
            clipped(settings, model)
            optimizer.step()
            schedule.step()
        found = scores(task, model, data.val_dataloader())
        print(f"epoch {epoch + 1}/{epochs}: {found}", file=sys.stderr, flush=True)
        kept.append((sign * found[monitor], state_of(model), found))
        kept = [max(kept, key=lambda one: one[0])]
    return kept[0][1], kept[0][2]


def optimizer_of(settings: dict[str, Any], model: nn.Module) -> torch.optim.AdamW:
    """Return AdamW with the run's rates: the head's own, and decay of matrices alone."""
    given = settings["optimizer"]
    groups = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = given["head_lr"] if "modules_to_save" in name else None
            decay = given["weight_decay"] if parameter.dim() > 1 else 0.0
            groups.append({"params": [parameter], "lr": rate or given["lr"], "weight_decay": decay})
    return torch.optim.AdamW(groups)


def clipped(settings: dict[str, Any], model: nn.Module) -> None:
    if norm := settings["trainer"].get("gradient_clip_val"):
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], norm)


def set_epoch(loader: DataLoader[Any], epoch: int) -> None:
    for sampler in (loader.sampler, loader.batch_sampler):
        if callable(chosen := getattr(sampler, "set_epoch", None)):
            chosen(epoch)


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return copy.deepcopy({name: tensor.detach() for name, tensor in trained.items()})


@torch.no_grad()
def scores(task: Task, model: nn.Module, loader: DataLoader[Any]) -> dict[str, float]:
    """Return the task's metrics; the base keeps the mode that it came with, as in a run."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    metrics, losses, weights = task.metrics(), [], []
    for batch in loader:
        out = task.evaluate(model, batch)
        metrics.update(out.predictions, out.targets)
        rows = 1 if out.targets is None else len(out.targets)
        weights.append(rows if out.weight is None else out.weight)
        losses.append(weights[-1] * float(out.loss))
    for module, mode in modes.items():
        module.training = mode
    found = {name: float(value) for name, value in metrics.compute().items()}
    return found | {"loss": sum(losses) / sum(weights)}


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # peft's and transformers' own
    main()
