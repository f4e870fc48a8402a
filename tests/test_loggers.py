"""Metrics survive a resume; a W&B run is continued, and keeps the command line's secrets out."""

import csv
from pathlib import Path

import pytest
import torch

from lightning_peft.errors import ConfigError
from lightning_peft.loggers import MetricsFile, wandb_logger


def _rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def test_a_new_column_does_not_cost_the_old_rows(tmp_path: Path) -> None:
    logger = MetricsFile(tmp_path / "run", flush_every=1)
    logger.log_metrics({"train/loss": torch.tensor(0.5)}, step=1)
    logger.log_metrics({"train/loss": 0.25, "val/accuracy": 0.75}, step=2)
    assert _rows(tmp_path / "run") == [
        {"step": "1", "train/loss": "0.5"},
        {"step": "2", "train/loss": "0.25", "val/accuracy": "0.75"},
    ]


def test_a_resumed_run_appends(tmp_path: Path) -> None:
    for step in (1, 2):
        logger = MetricsFile(tmp_path)
        logger.log_metrics({"train/loss": step / 2}, step=step)
        logger.finalize("success")
    assert [row["step"] for row in _rows(tmp_path)] == ["1", "2"]


def test_nothing_is_written_without_metrics(tmp_path: Path) -> None:
    MetricsFile(tmp_path).finalize("failed")
    assert not list(tmp_path.iterdir())


def test_rows_wait_for_one_write(tmp_path: Path) -> None:
    logger = MetricsFile(tmp_path, flush_every=3)
    for step in range(4):
        logger.log_metrics({"loss": 1.0}, step=step)
    assert len(_rows(tmp_path)) == 3
    logger.save()
    assert len(_rows(tmp_path)) == 4


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HOME", "NETRC", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("offline")
def test_a_resumed_run_keeps_its_id(tmp_path: Path) -> None:
    ids = []
    for _ in range(2):
        run = wandb_logger(tmp_path / "run", offline=True).experiment
        ids.append(run.id)
        run.finish()
    other = wandb_logger(tmp_path / "other", offline=True).experiment
    other.finish()
    assert ids[0] == ids[1] != other.id


@pytest.mark.usefixtures("offline")
def test_without_a_login_the_remedy_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"wandb login.*logger\.wandb\.offline=true"):
        wandb_logger(tmp_path / "run")
