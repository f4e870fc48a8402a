"""`job=list` shows what there is, and explains it."""

import pytest

from lightning_peft.jobs.conf import Conf, own_folder
from lightning_peft.jobs.list import field_docs
from lightning_peft.methods.lora import LoRA
from tests.jobs.command import Run


def test_every_option_has_its_line(run: Run) -> None:
    shown = run("job=list").out
    conf = Conf(own_folder())
    for group in conf.groups():
        for option in conf.options(group):
            assert f" {option} " in shown


def test_an_option_explains_its_settings(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = run("job=list", "method=lora", "method.lora.r=3").out
    assert "method.lora.r " in shown
    assert " 3 " in shown
    assert field_docs(LoRA)["r"].split(";")[0] in shown
    assert "method.lora.rank_pattern" in shown
    assert "trainer" not in shown
    assert "projections), patterns" in shown  # not cut off at a colon
    assert "peak learning rate of what the methods train" in shown  # under `optimizer`
    assert "adapter.train" in shown


@pytest.mark.parametrize(
    ("choice", "setting"),
    [
        ("trainer=cpu", "trainer.max_epochs"),
        ("data=reviews", "data.validation"),
        ("logger=wandb", "logger.wandb.project"),
        ("callbacks=default", "callbacks.best.save_top_k"),
        ("task=sentiment", "task.labels"),
        ("model=minilm", "model.revision"),
    ],
)
def test_every_group_can_be_explained(run: Run, choice: str, setting: str) -> None:
    done = run("job=list", choice)
    assert done.code == 0, done.err
    line = next(line for line in done.out.splitlines() if f" {setting} " in line)
    meaning = line.split("│")[-2]
    assert len(meaning.strip()) > 5
