"""Learning rate and gradient norm reach the logger at the steps that are logged."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_peft.callbacks import AdapterStats
from lightning_peft.callbacks.adapter_stats import gradient_norm, learning_rates
from lightning_peft.loggers import MetricsFile


class Recorder(MetricsFile):
    """Keeps each logged row."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.logged: dict[str, list[tuple[int | None, float]]] = {}

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        for name, value in metrics.items():
            self.logged.setdefault(name, []).append((step, float(value)))


class BeforeClipping(Callback):
    """Measures the norm of all gradients by hand, after the backward pass."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))


def test_the_norm_before_clipping_and_the_rate_are_logged(
    tuned: LightningModule, batches: Any, make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    logger, by_hand = Recorder(tmp_path), BeforeClipping()
    make_trainer(
        callbacks=[by_hand, AdapterStats()],
        enable_progress_bar=False,
        logger=logger,
        gradient_clip_val=1e-4,
        max_epochs=1,
    ).fit(tuned, batches, batches)
    norms = [value for _, value in logger.logged["adapter/grad_norm"]]
    assert norms == pytest.approx(by_hand.norms)
    assert min(norms) > 1e-3
    assert [value for _, value in logger.logged["lr"]] == pytest.approx([0.01] * 4)
    assert logger.logged["adapter/parameters"] == [(0, 82)]
    assert logger.logged["adapter/bytes"] == [(0, 328)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_only_the_logged_steps_are_measured(
    tuned: LightningModule,
    batches: Any,
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    accumulate: int,
) -> None:
    measured = []

    def spy(optimizer: torch.optim.Optimizer) -> torch.Tensor:
        measured.append(optimizer)
        return gradient_norm(optimizer)

    monkeypatch.setattr("lightning_peft.callbacks.adapter_stats.gradient_norm", spy)
    logger = Recorder(tmp_path)
    make_trainer(
        callbacks=[AdapterStats()],
        enable_progress_bar=False,
        logger=logger,
        log_every_n_steps=2,
        accumulate_grad_batches=accumulate,
        max_epochs=3,
    ).fit(tuned, batches, batches)
    steps = 3 * 4 // accumulate
    assert len(measured) == steps // 2
    assert [s for s, _ in logger.logged["adapter/grad_norm"]] == list(range(1, steps, 2))
    assert len(logger.logged["adapter/grad_norm"]) == len(logger.logged["train/loss"])


def test_without_a_logger_nothing_is_measured(
    tuned: LightningModule, batches: Any, make_trainer: Callable[..., Trainer]
) -> None:
    trainer = make_trainer(callbacks=[AdapterStats()], enable_progress_bar=False)
    trainer.fit(tuned, batches, batches)
    assert "adapter/grad_norm" not in trainer.callback_metrics


def test_groups_with_different_rates_are_told_apart() -> None:
    first, second = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [first], "name": "head"}, {"params": [second]}], lr=0.5)
    assert learning_rates(optimizer) == {"lr": 0.5}
    optimizer.param_groups[0]["lr"] = 1.0
    assert learning_rates(optimizer) == {"lr/head": 1.0, "lr/1": 0.5}


def test_a_gradient_that_is_sharded_over_two_processes_has_one_norm(tmp_path: Path) -> None:
    script = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("sharded_norm.py"))]
    root = str(Path(__file__).parents[2])
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    ranks = [
        subprocess.Popen(
            [*script, str(tmp_path / "store"), str(rank)], stdout=subprocess.PIPE, env=settings
        )
        for rank in range(2)
    ]
    norms = [json.loads(process.communicate(timeout=300)[0]) for process in ranks]
    assert norms[0]["whole"] > 0
    for norm in norms:
        assert norm == pytest.approx({"whole": norms[0]["whole"], "sharded": norms[0]["whole"]})
