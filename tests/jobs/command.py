"""What the tests of the command line share."""

import csv
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

GOOD = ["great", "lovely", "tasty", "perfect", "delicious"]
BAD = ["awful", "stale", "bitter", "horrible", "rotten"]
OTHER = ["coffee", "tea", "the", "was", "a"]


@dataclass
class Command:
    """What one command left behind."""

    code: int
    out: str
    err: str


Run = Callable[..., Command]


def write_rows(path: Path, count: int, seed: int, label: str | None = "label") -> Path:
    """Write rows whose label can be told from their words."""
    draw = random.Random(seed)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text", *([label] if label else [])])
        for i in range(count):
            good = i % 2 == 0
            words = [draw.choice(GOOD if good else BAD), *draw.choices(OTHER, k=5)]
            writer.writerow([i, " ".join(words), *(["good" if good else "bad"] if label else [])])
    return path
