"""A bar in a terminal, lines in a file."""

from collections.abc import Callable
from typing import Any

import pytest
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from lightning_peft.callbacks import EpochLines, progress_bar


def test_a_terminal_gets_a_bar_and_a_file_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    assert isinstance(progress_bar(), EpochLines)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert isinstance(progress_bar(), RichProgressBar)


def test_each_epoch_is_one_line_without_control_codes(
    tuned: LightningModule,
    batches: Any,
    make_trainer: Callable[..., Trainer],
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer = make_trainer(callbacks=[EpochLines()], num_sanity_val_steps=0)
    trainer.fit(tuned, batches, batches)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" · ")[:2] for line in lines] == [
        ["epoch 1/2", "step 4"],
        ["epoch 2/2", "step 8"],
    ]
    accuracy = float(trainer.callback_metrics["val/accuracy"])
    assert f"val/accuracy {accuracy:.4g}" in lines[1].split(" · ")


def test_a_disabled_bar_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    lines = EpochLines()
    lines.disable()
    lines.print("nothing")
    lines.enable()
    lines.print("something")
    assert capsys.readouterr().out == "something\n"
