"""The demo's claim over several seeds: LoRA on MiniLM against what the frozen base is worth.

    .venv/bin/python tests/benchmarks/reviews.py runs/seeds [override ...] --seeds 0 1 2

Each seed is one `lightning-peft experiment=demo` in a folder of its own; a finished one is not run
again, so an interrupted table is resumed. All seeds train, validate and test on the same rows, so
the baseline, the better of the two on validation, is fitted once.
Prints a Markdown table of means with 95 % intervals (Student's t).
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from lightning_peft.report import readable_share

_T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t for a two-sided 95 % interval by number of seeds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    reports = [
        _report(arguments.folder, seed, [f"job.baseline={i == 0}".lower(), *arguments.overrides])
        for i, seed in enumerate(arguments.seeds)
    ]
    baseline = _better_baseline(reports[0]["results"][:-1])
    tuned = [report["results"][-1] for report in reports]
    print(
        f"| over {len(reports)} seeds | test accuracy | test macro F1 | trained | share | seconds |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    print(_row(baseline["name"], [baseline]))
    print(_row(tuned[0]["name"], tuned))
    gains = [_interval(_gains(tuned, baseline, metric)) for metric in ("accuracy", "f1")]
    print(f"| gain | {' | '.join(gains)} | | | |")


def _report(folder: Path, seed: int, overrides: list[str]) -> dict[str, Any]:
    run = folder / f"seed-{seed}"
    if not (run / "report.json").exists():
        command = Path(sys.executable).with_name("lightning-peft")
        arguments = ["experiment=demo", f"seed={seed}", "data.seed=0", f"folder={run}", *overrides]
        subprocess.run([command, *arguments], check=True, stdout=sys.stderr)
    found: dict[str, Any] = json.loads((run / "report.json").read_text(encoding="utf-8"))
    return found


def _better_baseline(results: list[dict[str, Any]]) -> dict[str, Any]:
    return max(results, key=lambda result: result["validation"]["accuracy"])


def _row(name: str, results: list[dict[str, Any]]) -> str:
    accuracy = _interval([result["test"]["accuracy"] for result in results])
    f1 = _interval([result["test"]["f1"] for result in results])
    seconds = statistics.mean(result["seconds"] for result in results)
    first = results[0]
    return (
        f"| {name} | {accuracy} | {f1} | {first['trained']:,} "
        f"| {readable_share(first['trained'], first['total'])} | {seconds:.0f} |"
    )


def _gains(tuned: list[dict[str, Any]], baseline: dict[str, Any], metric: str) -> list[float]:
    return [result["test"][metric] - baseline["test"][metric] for result in tuned]


def _interval(values: list[float]) -> str:
    mean = statistics.mean(values)
    if len(values) not in _T95:
        return f"{mean:.3f}"
    half = _T95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.3f} ± {half:.3f}"


if __name__ == "__main__":
    main()
