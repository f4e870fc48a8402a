"""Rows that can be told apart by their tokens, for tests of who gets which."""

import json
from pathlib import Path
from typing import Any

from transformers import BertTokenizerFast

from lightning_peft.data.classification import ClassificationData
from lightning_peft.data.markets import MarketData

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def tokenizer(folder: Path, count: int = 200) -> BertTokenizerFast:
    """A tokenizer that knows the words w0, w1, ..."""
    words = [*SPECIAL, *(f"w{i}" for i in range(count))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=8)


def write(path: Path, numbers: Any) -> str:
    """Write a row for each number."""
    rows = ({"text": f"w{i}", "label": "ab"[i % 2]} for i in numbers)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(loader: Any) -> list[list[int]]:
    """Return the numbers of the rows in each batch."""
    return [(batch["input_ids"][:, 1] - len(SPECIAL)).tolist() for batch in loader]


def data(folder: Path, **settings: Any) -> ClassificationData:
    """Rows 0 to 99 to train on, 100 to 132 to validate, 3 a batch."""
    path = {
        "train": write(folder / "train.jsonl", range(100)),
        "validation": write(folder / "validation.jsonl", range(100, 133)),
    }
    defaults = {"path": path, "labels": ["a", "b"], "batch_size": 3, "max_length": 8}
    return ClassificationData(**{**defaults, **settings}).connect(tokenizer(folder))


def markets(folder: Path) -> MarketData:
    """The same rows, of three markets in turn."""
    rows = {"_target_": "lightning_peft.data.classification.ClassificationData", "batch_size": 3}
    path = {"train": folder / "train.csv", "validation": folder / "validation.csv"}
    for file, numbers in zip(path.values(), (range(100), range(100, 133)), strict=True):
        lines = ["text,label,market", *(f"w{i},{'ab'[i % 2]},{'xyz'[i % 3]}" for i in numbers)]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    files = {split: str(file) for split, file in path.items()}
    found = MarketData(path=files, in_turn=True, rows=rows | {"max_length": 8})
    found.rows.connect(tokenizer(folder))
    return found
