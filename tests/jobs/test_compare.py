"""`job=compare`: contenders in processes of their own, and one table."""

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lightning_peft.jobs import child, compare
from tests.jobs.command import Command, Run

BRIEF = ("job=compare", "folder=both", "trainer.max_epochs=1", "data.limit=8")


@pytest.fixture(scope="module")
def compared(
    small: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Command, list[str]]:
    """The folder of a comparison, what it printed, and its command; not to be changed."""
    folder = tmp_path_factory.mktemp("compared")
    arguments = [*small[:-1], *BRIEF, "job.methods=[lora,full]", "method.lora.r=2"]
    done = subprocess.run(
        [sys.executable, "-m", "lightning_peft.cli", *arguments],
        capture_output=True, text=True, cwd=folder, timeout=300,
        env=child.environment(),
    )  # fmt: skip
    return folder, Command(done.returncode, done.stdout, done.stderr), arguments


@pytest.fixture
def copy(
    compared: tuple[Path, Command, list[str]], tmp_path: Path, run: Run
) -> tuple[list[str], Run]:
    """A copy of the comparison in the folder where `run` runs, and its command."""
    shutil.copytree(compared[0] / "both", tmp_path / "both")
    return compared[2], run


def _refuse(*_: object) -> str:
    raise AssertionError("nothing is to be run")


def test_one_table_shows_what_each_method_is_worth_and_costs(
    compared: tuple[Path, Command, list[str]],
) -> None:
    folder, done, _ = compared
    assert done.code == 0, done.err
    with (folder / "both" / "compare.csv").open(encoding="utf-8") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert list(rows)[2:] == ["lora", "full"]
    assert all("frozen base" in name for name in list(rows)[:2])
    assert int(rows["lora"]["trained"]) < int(rows["full"]["trained"])
    assert int(rows["lora"]["adapter_bytes"]) < int(rows["full"]["adapter_bytes"])
    for row in rows.values():
        assert 0 <= float(row["test/accuracy"]) <= 1
        assert int(row["memory"] or 10**9) > 10**8
    assert "val accuracy" in (folder / "both" / "compare.md").read_text(encoding="utf-8")
    assert (folder / "both" / "compare.png").is_file()
    assert "epoch 1/1" in done.out
    for name in rows:
        assert name.split()[0] in done.out


def test_each_method_has_its_own_settings_and_the_same_data(
    compared: tuple[Path, Command, list[str]],
) -> None:
    lora, full = (
        yaml.safe_load((compared[0] / "both" / name / "seed-0" / "config.yaml").read_text())
        for name in ("lora", "full")
    )
    assert lora["method"]["lora"]["r"] == 2
    assert (lora["optimizer"]["lr"], full["optimizer"]["lr"]) == (1e-3, 5e-5)
    for part in ("data", "trainer", "model", "task", "seed"):
        assert lora[part] == full[part]


def test_what_is_finished_is_not_run_again(
    copy: tuple[list[str], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    command, run = copy
    before = Path("both", "compare.csv").read_text(encoding="utf-8")
    monkeypatch.setattr(compare, "run_command", _refuse)
    done = run(*command)
    assert done.code == 0, done.err
    assert Path("both", "compare.csv").read_text(encoding="utf-8") == before


def test_other_settings_do_not_take_up_a_run(
    copy: tuple[list[str], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    command, run = copy
    monkeypatch.setattr(compare, "run_command", _refuse)
    done = run(*command, "data.batch_size=4")
    assert done.code == 1
    assert "run of baseline with another `data.batch_size`: 8 instead of 4" in done.err


def test_an_interrupted_run_is_resumed_and_one_without_a_checkpoint_begun_anew(
    copy: tuple[list[str], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    command, run = copy
    Path("both/lora/seed-0/report.json").unlink()
    Path("both/full/seed-0/report.json").write_text("{ damaged")
    shutil.rmtree("both/full/seed-0/checkpoints")
    seen = []
    monkeypatch.setattr(compare, "run_command", lambda arguments, *_: seen.append(arguments) or "")
    done = run(*command)
    assert seen[0] == ["job=resume", "run=both/lora/seed-0", "job.baseline=false"]
    assert {"job=fit", "method=full", "folder=both/full/seed-0"} <= set(seen[1])
    assert done.code == 1
    assert "2 of 4 runs failed (lora, full)" in done.err


def test_a_contender_that_fails_is_named_and_stops_no_other(
    copy: tuple[list[str], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    command, run = copy
    shutil.rmtree("both/lora")
    monkeypatch.setattr(
        compare, "run_command", lambda arguments, log, show: child._reason(1, ["a", "Error: no r."])
    )
    done = run(*command)
    assert done.code == 1
    assert "lora, seed 0 failed: no r." in done.out
    found = json.loads(Path("both/compare.json").read_text(encoding="utf-8"))
    by_name = {one["name"]: one for one in found["contenders"]}
    assert by_name["lora"]["runs"][0]["error"] == "no r."
    assert by_name["full"]["test"]["accuracy"]["mean"] >= 0
    assert "## Failed" in Path("both/compare.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["job.methods=[lora,fll]"], "`job.methods` must name options of `method`.*`full`"),
        (["job.methods=[lora,lora]"], "`job.methods` must be one or more, all different"),
        (["job.seeds=[1,1]"], "`job.seeds` must be one or more, all different"),
        (["method=lora"], "`method` must be left out"),
        (["+job.overrides.ful.optimizer.lr=1"], "`job.overrides` must name contenders.*`full`"),
        (["+job.overrides.full.optimiser.lr=1"], "`full` cannot be composed: .*optimiser"),
        (["folder=a_file"], "`folder` must be new or of an earlier comparison"),
    ],
)
def test_a_comparison_is_checked_before_it_begins(
    small: list[str],
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    settings: list[str],
    message: str,
) -> None:
    Path("a_file").touch()
    monkeypatch.setattr(compare, "run_command", _refuse)
    done = run(*small, "job=compare", *settings)
    assert done.code == 1
    assert re.search(message, done.err), done.err
    assert not Path("runs").exists()


def test_a_recipe_gives_its_settings_to_its_own_method_alone(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(compare, "run_command", lambda arguments, *_: seen.append(arguments) or "x")
    more = "+job.overrides.full.optimizer.warmup=0.5"
    run("experiment=ner_wnut17", "job=compare", "job.methods=[lora,full,[lora,freeze]]",
        "job.baseline=false", "job.seeds=[3,4]", more)  # fmt: skip
    assert len(seen) == 6
    lora, full, both = seen[0], seen[2], seen[4]
    assert not any(text.startswith("optimizer.") for text in lora)
    assert "optimizer.lr=5e-05" in full
    assert full.index("optimizer.warmup=0.06") < full.index("optimizer.warmup=0.5")
    assert {"method=[lora,freeze]", "optimizer.lr=0.0001", "seed=3", "data.seed=0"} <= set(both)


def test_what_ends_the_comparison_ends_its_run(tmp_path: Path) -> None:
    script = (
        "import signal, sys, time; signal.signal(signal.SIGINT, lambda *_: (print('saved', "
        "flush=True), sys.exit(130))); print('begun', flush=True); time.sleep(60)"
    )
    parent = (
        "import signal, sys; from pathlib import Path; from lightning_peft.jobs import child; "
        # What a shell starts in the background ignores the signal otherwise.
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"child.COMMAND = [sys.executable, '-c', {script!r}]; "
        "child.run_command([], Path('log'), lambda line: print(line, flush=True))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent], cwd=tmp_path, env=child.environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert time.monotonic() - begun < 20
    assert (tmp_path / "log").read_text() == "begun\nsaved\n"
