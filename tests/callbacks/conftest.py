"""A small tuned module, and a W&B that stays offline."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import LoRA, inject


class Tuned(LightningModule):
    """A two-layer classifier (8 -> 16 -> 2) with LoRA on the first layer and a trained head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        self.head = nn.Linear(16, 2)
        inject(self, LoRA(r=2, targets="body.0"), train="head", head=False)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.head(self.body(batch[0])), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        right = self.head(self.body(batch[0])).argmax(-1) == batch[1]
        self.log("val/accuracy", right.float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


@pytest.fixture
def tuned() -> Tuned:
    return Tuned()


@pytest.fixture
def batches() -> DataLoader[Any]:
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=8)


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    def make(**settings: Any) -> Trainer:
        quiet = {"enable_model_summary": False, "enable_checkpointing": False, "logger": False}
        if not settings.get("callbacks"):
            quiet["enable_progress_bar"] = False
        return Trainer(
            accelerator="cpu",
            default_root_dir=tmp_path,
            **{"max_epochs": 2, "log_every_n_steps": 1, **quiet, **settings},
        )

    return make


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep W&B off the network, quiet, and out of the home folder."""
    for name in ("HOME", "NETRC", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
