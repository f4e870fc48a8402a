"""What a comparison shows of the runs of each contender."""

import csv
import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from lightning_peft.comparison import (
    Comparison,
    Contender,
    Run,
    markdown,
    plot_comparison,
    print_comparison,
    write_comparison,
)
from lightning_peft.memory import peak_memory
from lightning_peft.report import Result


def run(seed: int, accuracy: float, memory: int | None = 600_000_000) -> Run:
    result = Result(
        name="lora",
        validation={"loss": 0.4, "accuracy": accuracy},
        test={"accuracy": accuracy - 0.1},
        trained=2_000,
        total=100_000,
        adapter_bytes=8_000,
        seconds=10.0 * (seed + 1),
        memory=memory,
    )
    return Run(folder=Path("lora", f"seed-{seed}"), seed=seed, metric="accuracy", result=result)


@pytest.fixture
def comparison() -> Comparison:
    failed = Run(folder=Path("full/seed-0"), seed=0, error="the disk | is full")
    return Comparison(
        title="two",
        metric="accuracy",
        contenders=[
            Contender(name="frozen base", runs=[run(0, 0.6, None)]),
            Contender(name="lora", runs=[run(0, 0.8), run(1, 0.9)]),
            Contender(name="full", runs=[failed, run(1, 0.85)]),
            Contender(name="dora", runs=[failed]),
        ],
    )


def test_the_table_shows_means_with_their_spread(comparison: Comparison) -> None:
    lines = markdown(comparison).splitlines()
    header, _, base, lora, full, dora = (line.strip("| ").split(" | ") for line in lines[2:8])
    assert header[:4] == ["model", "val accuracy", "test accuracy", "val loss"]
    assert header[-6:] == ["trained", "share", "memory", "seconds", "adapter", "seeds"]
    assert lora[:3] == ["lora", "0.8500 ± 0.0707", "0.7500 ± 0.0707"]
    assert lora[-6:] == ["2,000", "2.00%", "600 MB", "15", "8.0 kB", "2 of 2"]
    assert (base[-4], base[-1]) == ("-", "1 of 1")
    assert full[1] == "0.8500"
    assert full[-1] == "1 of 2"
    assert set(dora[1:-1]) == {"-"}


def test_what_failed_is_named(comparison: Comparison) -> None:
    assert "- full, seed 0 failed: the disk | is full" in markdown(comparison)
    console = Console(file=io.StringIO(), width=160)
    print_comparison(comparison, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "dora, seed 0 failed: the disk | is full" in shown


def test_programs_get_each_run(comparison: Comparison, tmp_path: Path) -> None:
    write_comparison(tmp_path, comparison)
    with (tmp_path / "compare.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["seed"]) for row in rows][1:3] == [("lora", "0"), ("lora", "1")]
    assert rows[2]["validation/accuracy"] == "0.9"
    assert rows[-1]["error"] == "the disk | is full"
    found = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    lora = found["contenders"][1]
    assert lora["test"]["accuracy"]["mean"] == pytest.approx(0.75)
    assert [one["result"]["memory"] for one in lora["runs"]] == [600_000_000] * 2


def test_the_plot_shows_what_ended_well(comparison: Comparison, tmp_path: Path) -> None:
    assert plot_comparison(tmp_path / "compare.png", comparison).stat().st_size > 5_000


def test_peak_memory_grows_with_what_is_held() -> None:
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(100_000_000)  # 400 MB, written to
    after = peak_memory(torch.device("cpu"))
    assert before is not None
    assert after is not None
    assert after > 10**8
    assert after - before > 10**8 or before > held.nbytes * 2
