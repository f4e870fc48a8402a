"""Every method on SST-2 beside peft's run of the same method: what it reaches and what it costs.

    .venv/bin/python tests/benchmarks/sst2.py runs/sst2 --methods lora ia3 --seeds 0 1 2

MiniLM learns the sentences of `shared/data/sst2`, two epochs, batch 32, AdamW with a cosine and
gradients clipped at norm 1, every contender with the same loop, rows and order. First each
contender's learning rate is chosen from a grid in one epoch of a subset, by accuracy on the
development rows; of rates with which nothing is learned there, the highest. Then it is trained on
all rows; should it be worse on the development rows than on the subset, the rate is unstable, and
the next best one is taken. The test rows score what has been chosen. A training is a process of its
own (so that its peak of memory is its own) with one thread, and leaves a JSON file; what is there
is not run again. Prints a Markdown table; its seconds are the CPU's, for training alone.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf" / "method"
SUBSET, EPOCHS = 1500, 2
GRID = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
REACH = 1
"""How many steps of the grid to either side of a method's own learning rate are tried."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", nargs="+", default=sorted(p.stem for p in CONF.glob("*.yaml")))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--limit", type=int, help="so many training rows, for a trial")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    print(
        "| method | by | rate | test accuracy | trained | peak MB | CPU seconds | file bytes |\n"
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    for method in arguments.methods:
        for who in ("ours", "peft"):
            if who == "ours" or has_rival(method):
                print(contest(arguments, who, method), flush=True)


def contest(arguments: argparse.Namespace, who: str, method: str) -> str:
    """Choose a learning rate, train with each seed, and return a row of the table."""
    lr = chosen(arguments, who, method)
    runs = [full(arguments, who, method, lr, seed) for seed in arguments.seeds]
    scores = [run["accuracy"]["test"] for run in runs]
    spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
    peak = max(run["peak_mb"] for run in runs)
    seconds = statistics.mean(run["seconds"] for run in runs)
    return (
        f"| {method} | {who} | {lr:g} | {statistics.mean(scores):.3f}{spread} "
        f"| {runs[0]['trained']:,} | {peak:.0f} | {seconds:.0f} | {runs[0]['bytes']:,} |"
    )


def chosen(arguments: argparse.Namespace, who: str, method: str) -> float:
    """Return the best learning rate of the subset with which all rows are not worse than it."""
    rows = min(SUBSET, arguments.limit or SUBSET)
    tried = {
        lr: trained(arguments.folder, who, method, lr, 0, rows, 1, ["dev"])["accuracy"]["dev"]
        for lr in rates(method)
    }
    best = sorted(tried, key=lambda lr: (tried[lr], lr), reverse=True)
    for lr in best:
        if full(arguments, who, method, lr, 0)["accuracy"]["dev"] >= tried[lr]:
            return lr
    return best[0]


def full(
    arguments: argparse.Namespace, who: str, method: str, lr: float, seed: int
) -> dict[str, Any]:
    """Return what a training on all rows gave."""
    limit = arguments.limit
    return trained(arguments.folder, who, method, lr, seed, limit, EPOCHS, ["dev", "test"])


def rates(method: str) -> list[float]:
    """Return the part of the grid around the learning rate of the method's own YAML."""
    settings = yaml.safe_load((CONF / f"{method}.yaml").read_text(encoding="utf-8"))
    own = float(settings["optimizer"]["lr"])
    nearest = min(range(len(GRID)), key=lambda i: abs(GRID[i] / own - own / GRID[i]))
    return list(GRID[max(0, nearest - REACH) : nearest + REACH + 1])


def trained(
    folder: Path,
    who: str,
    method: str,
    lr: float,
    seed: int,
    limit: int | None,
    epochs: int,
    splits: list[str],
) -> dict[str, Any]:
    """Return what one training gave, from its file or by running it."""
    file = folder / f"{who}-{method}-lr{lr:g}-seed{seed}-{limit or 'all'}-{epochs}.json"
    if not file.exists():
        settings = {"who": who, "method": method, "lr": lr, "seed": seed, "limit": limit}
        settings |= {"epochs": epochs, "splits": splits}
        print(f"training {file.stem}", file=sys.stderr, flush=True)
        script = Path(__file__).with_name("sst2_run.py")
        command = [sys.executable, str(script), json.dumps(settings), str(file)]
        subprocess.run(command, check=True)
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def has_rival(method: str) -> bool:
    """Whether peft has the method."""
    from sst2_run import RIVALS

    return method in RIVALS


if __name__ == "__main__":
    main()
