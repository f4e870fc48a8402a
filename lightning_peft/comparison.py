"""Several methods side by side: a table for people, and files for programs.

A `Comparison` holds what each run of each contender was worth; the functions below lay it out.
"""

import csv
import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_peft.errors import require
from lightning_peft.report import (
    Result,
    as_table,
    markdown_table,
    open_console,
    readable_bytes,
    readable_number,
    readable_share,
)

SPLITS = ("validation", "test")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a contender: what it was worth, or why it failed."""

    folder: Path
    seed: int
    metric: str = ""
    """Name of the metric that decides."""
    result: Result | None = None
    error: str = ""

    def __post_init__(self) -> None:
        if (self.result is None) != bool(self.error):
            raise ValueError("a run has either a result or an error")


@dataclass(frozen=True, kw_only=True)
class Contender:
    """What has a line in the table: a method, or what the base is worth without one."""

    name: str
    runs: Sequence[Run]

    @property
    def results(self) -> list[Result]:
        """The results of the runs that ended well."""
        return [run.result for run in self.runs if run.result is not None]

    def values(self, split: str, metric: str) -> list[float]:
        """Return a metric of each run that has it; `split` is validation or test."""
        found = [getattr(result, split).get(metric) for result in self.results]
        return [value for value in found if value is not None]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Contenders that had the same data, budget and seeds."""

    title: str
    metric: str
    """Name of the metric that decides, without a split."""
    contenders: Sequence[Contender]

    @property
    def metrics(self) -> list[str]:
        """The names of all metrics, that which decides first."""
        results = [result for one in self.contenders for result in one.results]
        names = {n: None for r in results for n in (*r.validation, *r.test)}
        return sorted(names, key=lambda name: name != self.metric)

    @property
    def failed(self) -> list[tuple[str, Run]]:
        """The runs that failed, with their contender's name."""
        return [(one.name, run) for one in self.contenders for run in one.runs if run.error]


def spread(values: Sequence[float]) -> float | None:
    """Return the standard deviation of a sample; None for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def print_comparison(found: Comparison, console: Console | None = None) -> None:
    """Print the table, and what failed."""
    console = console or open_console()
    console.print(as_table(found.title, *_table(found, [found.metric])))
    for line in _failures(found):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def markdown(found: Comparison) -> str:
    """Return the comparison as GitHub-flavoured Markdown, with every metric."""
    parts = [f"# {found.title}", markdown_table(*_table(found, found.metrics))]
    parts.append(
        "Means over the seeds ± standard deviation, where there are several. Seconds are the "
        "wall-clock time of training with its validation; memory is the peak up to its end, by "
        "CUDA's allocator on a GPU and else all that is resident, Python's libraries included."
    )
    if found.failed:
        parts += ["## Failed", "\n".join(f"- {line}" for line in _failures(found))]
    return "\n\n".join(parts) + "\n"


def write_comparison(folder: Path, found: Comparison) -> list[Path]:
    """Write compare.md, .json and .csv, and compare.png where matplotlib is installed.

    Returns:
        What was written.
    """
    files = [folder / f"compare.{kind}" for kind in ("md", "json", "csv")]
    files[0].write_text(markdown(found), encoding="utf-8")
    files[1].write_text(json.dumps(_as_json(found), indent=2) + "\n", encoding="utf-8")
    _write_csv(files[2], found)
    return files


def plot_comparison(png: Path, found: Comparison) -> Path:
    """Plot the metric that decides and the memory of each contender.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    # `Figure` without pyplot leaves the backend and the figures of a user's notebook alone.
    figure_class = require("matplotlib.figure", "plots").Figure
    shown = [one for one in found.contenders if one.results]
    figure = figure_class((9, 1.2 + 0.5 * len(shown)), 120)
    figure.set_layout_engine("constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, one in enumerate(shown):
        split = "test" if one.values("test", found.metric) else "validation"
        values = one.values(split, found.metric)
        left.plot(values, [place] * len(values), "o", color="C0", alpha=0.5)
        if values:
            left.plot(statistics.mean(values), place, "|", color="C0", ms=18)
        memory = [r.memory / 1e9 for r in one.results if r.memory is not None]
        right.barh(place, statistics.mean(memory) if memory else 0, color="C1", height=0.5)
    left.set_yticks(range(len(shown)), [one.name for one in shown])
    left.invert_yaxis()
    left.set_xlabel(f"{found.metric}, held out")
    right.set_xlabel("peak memory (GB)")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3, axis="x")
    figure.savefig(png)
    return png


def _table(found: Comparison, metrics: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    header = ["model", *(f"{s[:3] if s != 'test' else s} {m}" for m in metrics for s in SPLITS)]
    header += ["trained", "share", "memory", "seconds", "adapter"]
    several = max((len(one.runs) for one in found.contenders), default=1) > 1
    rows = []
    for one in found.contenders:
        row = [one.name, *(_mean(one.values(s, m)) for m in metrics for s in SPLITS)]
        row += _costs(one.results)
        rows.append([*row, f"{len(one.results)} of {len(one.runs)}"] if several else row)
    return [*header, "seeds"] if several else header, rows


def _mean(values: Sequence[float]) -> str:
    if not values:
        return "-"
    deviation = spread(values)
    mean = readable_number(statistics.mean(values))
    return mean if deviation is None else f"{mean} ± {deviation:.4f}"


def _costs(results: Sequence[Result]) -> list[str]:
    if not results:
        return ["-"] * 5
    first, memory = results[0], [r.memory for r in results if r.memory is not None]
    return [
        f"{first.trained:,}",
        readable_share(first.trained, first.total),
        readable_bytes(round(statistics.mean(memory))) if memory else "-",
        f"{statistics.mean(result.seconds for result in results):.0f}",
        readable_bytes(first.adapter_bytes),
    ]


def _failures(found: Comparison) -> list[str]:
    return [f"{name}, seed {run.seed} failed: {run.error}" for name, run in found.failed]


def _as_json(found: Comparison) -> dict[str, Any]:
    return {
        "title": found.title,
        "metric": found.metric,
        "contenders": [_contender_as_json(one, found.metrics) for one in found.contenders],
    }


def _contender_as_json(one: Contender, metrics: Sequence[str]) -> dict[str, Any]:
    summary: dict[str, dict[str, Any]] = {split: {} for split in SPLITS}
    for split in SPLITS:
        for metric in metrics:
            if values := one.values(split, metric):
                summary[split][metric] = {"mean": statistics.mean(values), "std": spread(values)}
    runs = [{**dataclasses.asdict(run), "folder": str(run.folder)} for run in one.runs]
    return {"name": one.name, **summary, "runs": runs}


def _write_csv(path: Path, found: Comparison) -> None:
    costs = ["trained", "total", "memory", "seconds", "adapter_bytes"]
    measured = [f"{split}/{metric}" for split in SPLITS for metric in found.metrics]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "seed", *measured, *costs, "error", "folder"])
        for one in found.contenders:
            for run in one.runs:
                result = dataclasses.asdict(run.result) if run.result is not None else {}
                values = [result.get(s, {}).get(m) for s in SPLITS for m in found.metrics]
                values += [result.get(cost) for cost in costs]
                writer.writerow([one.name, run.seed, *values, run.error, run.folder])
