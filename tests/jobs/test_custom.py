"""A task and a data module of the user's own, from the command line."""

import json
from pathlib import Path

from lightning_peft import config
from tests.jobs.command import Run

OWN = "tests.tasks.own_functions"


def test_own_functions_are_trained_judged_and_predict(run: Run, tiny_model: Path) -> None:
    settings = [
        "model=hf",
        f"model.name={tiny_model}",
        "task=custom",
        f"task.loss={OWN}.loss",
        f"task.predict={OWN}.predict",
        "+task.metrics.r2={_target_: torchmetrics.regression.R2Score}",
        "task.monitor=val/r2",
        "task.mode=max",
        "task.auto_class=AutoModelForSequenceClassification",
        "+task.config.num_labels=1",
        "data=own",
        f"data._target_={OWN}.Scores",
        "+data.batch_size=4",
        "trainer.max_epochs=1",
        "folder=run",
    ]
    refused = run(*settings)
    assert refused.code == 1
    assert "`allow=[my_package]`" in refused.err

    done = run("allow=[tests]", *settings)
    assert done.code == 0, done.err
    report = json.loads(Path("run/report.json").read_text(encoding="utf-8"))
    (own,) = report["results"]  # a fresh head is worth nothing by itself
    assert set(own["validation"]) == {"loss", "r2"}
    assert report["metric"] == "r2"

    config._user_packages.clear()  # as in a new process
    assert "`task.loss` must be a function" in run("job=validate", "run=run").err
    done = run("job=validate", "run=run", "allow=[tests]")
    assert done.code == 0, done.err
    kept = json.loads(Path("run/validation.json").read_text(encoding="utf-8"))
    assert kept["metrics"]["r2"] == own["validation"]["r2"]

    done = run("job=predict", "run=run", "allow=[tests]")
    assert done.code == 0, done.err
    lines = Path("run/predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [set(json.loads(line)) for line in lines] == [{"prediction"}] * 5
