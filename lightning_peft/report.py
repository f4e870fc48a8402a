"""The report at the end of a run: a table in the terminal, report.md, report.json and curves.png.

A `Report` holds what was measured, as plain data; the functions below only lay it out.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lightning_peft.errors import DataError, require

_EXAMPLE_CHARACTERS = 120


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one model was worth, and what it cost."""

    name: str
    """What was trained, for example ``frozen base + head`` or ``lora``."""
    validation: Mapping[str, float] = field(default_factory=dict)
    """Metrics on the validation set, on which everything was chosen."""
    test: Mapping[str, float] = field(default_factory=dict)
    """Metrics on the test set, which chose nothing."""
    trained: int
    """Trained parameters, the head included."""
    total: int
    """All parameters of the model, the trained ones included."""
    adapter_bytes: int
    """Bytes of the saved adapter folder."""
    seconds: float
    """Wall-clock seconds of training."""
    memory: int | None = None
    """Peak bytes up to the end of training, see `lightning_peft.memory`; None where unknown."""

    @property
    def share(self) -> float:
        """Trained parameters divided by all parameters."""
        return self.trained / self.total


@dataclass(frozen=True, kw_only=True)
class Example:
    """One prediction, as a person reads it."""

    text: str
    gold: str
    predicted: str
    score: float | None = None
    """Probability of what was predicted, 0 to 1, where there is one."""

    @property
    def right(self) -> bool:
        """Whether the prediction is the gold label."""
        return self.gold == self.predicted


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that a run's report shows."""

    title: str
    metric: str
    """Name of the metric that decides, a key of each result's `validation` and `test`."""
    results: Sequence[Result]
    """The baseline first, the tuned model last."""
    examples: Sequence[Example] = ()
    per_class: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Label -> precision, recall, f1, support of the tuned model on the test set."""
    paths: Mapping[str, Path] = field(default_factory=dict)
    """What lies where, for example ``{"adapter": Path("adapter")}``."""


def choose_examples(examples: Sequence[Example], count: int = 6) -> list[Example]:
    """Return `count` examples in their order: half right, half wrong if there are enough."""
    right = [i for i, example in enumerate(examples) if example.right]
    wrong = [i for i, example in enumerate(examples) if not example.right]
    shown_wrong = wrong[: max(count // 2, count - len(right))]
    return [examples[i] for i in sorted(right[: count - len(shown_wrong)] + shown_wrong)]


def folder_bytes(folder: str | Path) -> int:
    """Return the bytes of all files below `folder`."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def write_report(folder: str | Path, report: Report) -> None:
    """Write ``report.md`` for people and ``report.json`` for programs into `folder`."""
    folder = Path(folder)
    (folder / "report.md").write_text(markdown(report), encoding="utf-8")
    (folder / "report.json").write_text(
        json.dumps(_as_json(report), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the report's tables; without a terminal they come as plain text."""
    console = console or open_console()
    console.print(as_table(report.title, *_results_table(report)))
    if report.per_class:
        console.print(as_table(f"{report.results[-1].name}, by class", *_class_table(report)))
    if report.examples:
        console.print(as_table("Examples", *_example_table(report)))
    for name, path in report.paths.items():
        # A path must survive being copied, so it is never wrapped.
        console.print(f"[bold]{escape(name)}[/] {escape(str(path))}", soft_wrap=True)


def markdown(report: Report) -> str:
    """Return the report as GitHub-flavoured Markdown."""
    parts = [f"# {report.title}", markdown_table(*_results_table(report))]
    if report.per_class:
        parts += [f"## {report.results[-1].name}, by class", markdown_table(*_class_table(report))]
    if report.examples:
        parts += ["## Examples", markdown_table(*_example_table(report))]
    if report.paths:
        parts += ["## Files", "\n".join(f"- {k}: `{v}`" for k, v in report.paths.items())]
    return "\n\n".join(parts) + "\n"


def open_console() -> Console:
    """Return a console that keeps tables whole in a log file, which has no width of its own."""
    console = Console()
    return console if console.is_terminal or console.is_jupyter else Console(width=120)


def readable_bytes(count: int) -> str:
    """Return `count` bytes as ``512 B``, ``1.5 kB``, ``2.3 MB`` … (decimal prefixes)."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if size >= 100 or unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def readable_share(part: int, whole: int) -> str:
    """Return `part` of `whole` as a percentage, with two digits where two decimals show nothing."""
    share = part / whole
    return f"{share:.2%}" if share >= 0.001 or not part else f"{100 * share:.2g}%"


_Rows = tuple[list[str], list[list[str]]]


def _results_table(report: Report) -> _Rows:
    header = ["model", f"val {report.metric}", f"test {report.metric}"]
    header += ["trained", "share", "memory", "adapter", "seconds"]
    return header, [
        [
            result.name,
            readable_number(result.validation.get(report.metric)),
            readable_number(result.test.get(report.metric)),
            f"{result.trained:,}",
            readable_share(result.trained, result.total),
            "-" if result.memory is None else readable_bytes(result.memory),
            readable_bytes(result.adapter_bytes),
            f"{result.seconds:.0f}",
        ]
        for result in report.results
    ]


def _class_table(report: Report) -> _Rows:
    names = list(next(iter(report.per_class.values())))
    rows = [[label, *map(readable_number, row.values())] for label, row in report.per_class.items()]
    return ["label", *names], rows


def _example_table(report: Report) -> _Rows:
    rows = [
        [
            "✓" if e.right else "✗",
            *map(_shorten, (e.gold, e.predicted)),
            _score(e.score),
            _shorten(e.text),
        ]
        for e in report.examples
    ]
    return ["", "gold", "predicted", "score", "text"], rows


def readable_number(value: float | None) -> str:
    """Return a metric with four decimals, a count without, and a dash for none."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value > 1 and float(value).is_integer() else f"{value:.4f}"


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _shorten(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _EXAMPLE_CHARACTERS else f"{flat[: _EXAMPLE_CHARACTERS - 1]}…"


def as_table(title: str, header: list[str], rows: list[list[str]]) -> Table:
    """Return a table for the terminal; columns of numbers stand to the right."""
    table = Table(title=escape(title), title_justify="left", title_style="bold")
    for i, name in enumerate(header):
        table.add_column(escape(name), justify="right" if _numeric(rows, i) else "left")
    for row in rows:
        table.add_row(*map(_cell, header, row))
    return table


def _cell(column: str, content: str) -> Text:
    # An example takes one line, cut where the terminal ends; a name or a number is never cut.
    example = column == "text"
    return Text(content, no_wrap=example, overflow="ellipsis" if example else "fold")


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Return a table in GitHub-flavoured Markdown; columns of numbers stand to the right."""
    rule = ["---:" if _numeric(rows, i) else "---" for i in range(len(header))]
    cells = [header, rule, *[[cell.replace("|", "\\|") for cell in row] for row in rows]]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _numeric(rows: list[list[str]], column: int) -> bool:
    return all(row[column][:1].isdigit() or row[column] == "-" for row in rows)


def _as_json(report: Report) -> dict[str, Any]:
    content = asdict(report)
    for result, written in zip(report.results, content["results"], strict=True):
        written["share"] = result.share
    content["paths"] = {name: str(path) for name, path in report.paths.items()}
    return content


def plot_curves(metrics_csv: str | Path, png: str | Path) -> Path:
    """Plot losses, validation metrics and learning rate of a ``metrics.csv`` over the steps.

    The file may be sparse (a row fills only some columns), and may hold a step twice after a
    resume; the later row counts.

    Raises:
        DataError: the file does not exist or holds nothing to plot.
        MissingExtraError: matplotlib is not installed.
    """
    panels = _panels(_read_curves(Path(metrics_csv)))
    if not panels:
        raise DataError(
            f"`metrics_csv` must hold a loss, a validation metric or a learning rate, but "
            f"{metrics_csv} holds none: give the file of a finished run."
        )
    # `Figure` without pyplot leaves the backend and the figures of a user's notebook alone.
    figure = require("matplotlib.figure", "plots").Figure((4 * len(panels), 3.4), 120)
    figure.set_layout_engine("constrained")
    for axes, (title, curves) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        _draw(axes, title, curves)
    figure.savefig(png)
    return Path(png)


_Curve = dict[int, float]


def _read_curves(path: Path) -> dict[str, _Curve]:
    if not path.is_file():
        raise DataError(f"`metrics_csv` must be the metrics file of a run, but {path} is none.")
    curves: dict[str, _Curve] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = int(row["step"])
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    curves.setdefault(name, {})[step] = float(value)
    return {name: dict(sorted(curve.items())) for name, curve in curves.items()}


def _panels(curves: Mapping[str, _Curve]) -> dict[str, dict[str, _Curve]]:
    panels: dict[str, dict[str, _Curve]] = {}
    for name in sorted(curves):
        if name.startswith("lr"):
            title = "learning rate"
        elif name.startswith("test"):
            continue
        elif "loss" in name:
            title = "loss"
        elif name.startswith("val"):
            title = "validation"
        else:
            continue
        panels.setdefault(title, {})[name] = curves[name]
    order = ("loss", "validation", "learning rate")
    return {title: panels[title] for title in order if title in panels}


def _draw(axes: Any, title: str, curves: Mapping[str, _Curve]) -> None:
    for name, curve in curves.items():
        # A validation curve has few points: without marks a single one would be invisible.
        axes.plot(
            list(curve), list(curve.values()), "o-" if len(curve) < 20 else "-", ms=4, label=name
        )
    axes.set(title=title, xlabel="step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
