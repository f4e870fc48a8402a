"""The report: what a person reads, what a program reads, and the curves."""

import csv
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from lightning_peft.errors import DataError, MissingExtraError
from lightning_peft.report import (
    Example,
    Report,
    Result,
    choose_examples,
    folder_bytes,
    markdown,
    plot_curves,
    print_report,
    readable_bytes,
    readable_share,
    write_report,
)


def _example(text: str, right: bool) -> Example:
    return Example(text=text, gold="great", predicted="great" if right else "other", score=0.75)


@pytest.fixture
def report() -> Report:
    head = Result(
        name="frozen base + head",
        validation={"accuracy": 0.781},
        test={"accuracy": 0.7725},
        trained=770,
        total=22_713_986,
        adapter_bytes=3_480,
        seconds=31.4,
    )
    lora = Result(
        name="lora",
        validation={"accuracy": 0.84},
        test={"accuracy": 0.8361},
        trained=295_682,
        total=23_008_898,
        adapter_bytes=1_187_654,
        seconds=140.8,
        memory=1_203_000_000,
    )
    return Report(
        title="minilm on reviews",
        metric="accuracy",
        results=[head, lora],
        examples=[_example("so | good\n[bold]really[/]", True), _example("bad " * 60, False)],
        per_class={"great": {"precision": 0.9, "recall": 0.91, "f1": 0.905, "support": 650}},
        paths={"adapter": Path("runs/a/adapter")},
    )


def _printed(report: Report, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_report(report, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_terminal_shows_the_tuned_model_against_the_baseline(report: Report) -> None:
    head, lora = (line for line in _printed(report).splitlines() if "B │" in line)
    assert head.split("│")[1:-1] != lora.split("│")[1:-1]
    assert [cell.strip() for cell in lora.split("│")[1:-1]] == [
        "lora",
        "0.8400",
        "0.8361",
        "295,682",
        "1.29%",
        "1.2 GB",
        "1.2 MB",
        "141",
    ]
    assert "0.0034%" in head


def test_markup_in_a_review_is_shown_and_not_obeyed(report: Report) -> None:
    assert "so | good [bold]really[/]" in _printed(report)


def test_in_a_narrow_terminal_an_example_takes_one_line_and_names_stay_whole(
    report: Report,
) -> None:
    lines = _printed(report, width=60).splitlines()
    assert max(map(len, lines)) <= 60
    (wrong,) = [line for line in lines if "✗" in line]
    assert wrong.split("│")[5].strip().endswith("…")
    assert not any("bad" in line for line in lines if line != wrong)
    names = [line.split("│")[1].strip() for line in lines if line.count("│") == 9]
    assert "".join(names).replace(" ", "").startswith("frozenbase+head")


def test_without_a_terminal_no_control_codes_are_printed(report: Report) -> None:
    assert "\x1b" not in _printed(report)


def test_a_path_is_never_wrapped(report: Report) -> None:
    long = Path("runs") / ("x" * 200)
    shown = _printed(Report(title="t", metric="m", results=[], paths={"adapter": long}), width=40)
    assert f"adapter {long}" in shown.splitlines()


def test_markdown_rows_have_as_many_cells_as_their_header(report: Report) -> None:
    table: list[int] = []
    for line in markdown(report).splitlines():
        if not line.startswith("|"):
            table = []
            continue
        table.append(line.replace("\\|", "").count("|"))
        assert table[0] == table[-1], line
    assert "…" in markdown(report)


def test_the_written_report_reads_back_as_what_was_measured(report: Report, tmp_path: Path) -> None:
    write_report(tmp_path, report)
    content = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert content["results"][1]["test"] == {"accuracy": 0.8361}
    assert content["results"][1]["share"] == pytest.approx(295_682 / 23_008_898)
    assert content["examples"][1]["text"] == "bad " * 60
    assert content["paths"] == {"adapter": "runs/a/adapter"}
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == markdown(report)


@pytest.mark.parametrize(
    ("rights", "expected"),
    [
        ("++++++----", "+++---"),
        ("++++++++-", "+++++-"),
        ("+-------", "+-----"),
        ("-+-+-+-+", "-+-+-+"),
        ("+", "+"),
        ("", ""),
    ],
)
def test_examples_are_half_right_and_half_wrong_where_there_are_enough(
    rights: str, expected: str
) -> None:
    chosen = choose_examples([_example("x", sign == "+") for sign in rights])
    assert "".join("+" if example.right else "-" for example in chosen) == expected


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_600, "1.0 MB"), (2_345_000_000, "2.3 GB")],
)
def test_bytes_read_with_decimal_prefixes(count: int, text: str) -> None:
    assert readable_bytes(count) == text


def test_a_small_share_is_not_rounded_to_nothing() -> None:
    assert readable_share(770, 22_713_986) == "0.0034%"
    assert readable_share(1, 4) == "25.00%"
    assert readable_share(0, 4) == "0.00%"


def test_a_folder_is_measured_with_everything_below_it(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "below" / "b").write_bytes(b"123")
    assert folder_bytes(tmp_path) == 8


def _write_metrics(path: Path, rows: list[dict[str, float]]) -> Path:
    columns = sorted({name for row in rows for name in row})
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_curves_are_drawn_from_sparse_rows_and_the_later_of_two_rows_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes_module = pytest.importorskip("matplotlib.axes")
    drawn: dict[str, tuple[list[float], list[float]]] = {}
    plot = axes_module.Axes.plot

    def spy(self, x, y, *args, label, **kwargs):  # type: ignore[no-untyped-def]
        drawn[label] = (x, y)
        return plot(self, x, y, *args, label=label, **kwargs)

    monkeypatch.setattr(axes_module.Axes, "plot", spy)
    rows = [
        {"step": 0, "train/loss": 0.9, "lr": 0.0},
        {"step": 10, "train/loss": 0.5, "lr": 1e-3},
        {"step": 10, "val/loss": 0.6, "val/accuracy": 0.7, "epoch": 0},
        {"step": 5, "train/loss": 0.7},
        {"step": 10, "train/loss": 0.4, "adapter/grad_norm": 3.0},
        {"step": 20, "test/accuracy": 0.8},
    ]
    png = plot_curves(_write_metrics(tmp_path / "metrics.csv", rows), tmp_path / "curves.png")
    assert drawn == {
        "train/loss": ([0, 5, 10], [0.9, 0.7, 0.4]),
        "val/loss": ([10], [0.6]),
        "val/accuracy": ([10], [0.7]),
        "lr": ([0, 10], [0.0, 1e-3]),
    }
    assert png.read_bytes().startswith(b"\x89PNG")


def test_plotting_leaves_the_figures_of_a_notebook_alone(tmp_path: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    before = pyplot.get_fignums()
    path = _write_metrics(tmp_path / "metrics.csv", [{"step": 0, "train/loss": 1.0}])
    plot_curves(path, tmp_path / "curves.png")
    assert pyplot.get_fignums() == before


def test_a_file_without_curves_is_refused_by_name(tmp_path: Path) -> None:
    empty = _write_metrics(tmp_path / "metrics.csv", [{"step": 0, "test/accuracy": 1.0}])
    with pytest.raises(DataError, match=r"metrics\.csv holds none"):
        plot_curves(empty, tmp_path / "curves.png")
    with pytest.raises(DataError, match=r"absent\.csv is none"):
        plot_curves(tmp_path / "absent.csv", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    path = _write_metrics(tmp_path / "metrics.csv", [{"step": 0, "train/loss": 1.0}])
    with pytest.raises(MissingExtraError, match=r"lightning-peft\[plots\]"):
        plot_curves(path, tmp_path / "curves.png")
