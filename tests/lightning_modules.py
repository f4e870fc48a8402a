"""LightningModules as users write them, knowing nothing of adapters, and how they are trained."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

ROWS, BATCH = 24, 4


class Network(nn.Module):
    """Dropout and normalisation between three linear layers; `head` is the fresh one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 16)
        self.norm, self.dropout = nn.BatchNorm1d(16), nn.Dropout(0.2)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.fc1(x).relu())
        return self.head(self.dropout(self.fc2(hidden).relu()))


class Module(LightningModule):
    """A classifier with AdamW; `build` says in which hook its network is made."""

    def __init__(self, build: str = "init", lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.build, self.lr = build, lr
        self.stage: Any = None
        if build == "init":
            self.network = network()

    def setup(self, stage: str | None = None) -> None:
        self.stage = stage
        if self.build == "setup" and "network" not in self._modules:
            self.network = network()

    def configure_model(self) -> None:
        if self.build == "configure_model" and "network" not in self._modules:
            self.network = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch))

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.log("test/loss", self.loss(batch))

    def predict_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Around(LightningModule):
    """A module around a model of any kind that takes its inputs by keyword."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        returned = self.model(**batch)
        output = returned if isinstance(returned, Tensor) else returned[0]
        return (output - 1).pow(2).mean()

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def network() -> Network:
    """Return the pretrained network, with the same weights in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made = Network()
        made.norm.running_mean.normal_()
        return made


def loader(rows: int = ROWS, **settings: Any) -> DataLoader[Any]:
    """Return a loader of rows with three labels."""
    x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(x, x[:, :3].argmax(1))
    return DataLoader(data, **{"batch_size": BATCH, **settings})


def repeated(inputs: dict[str, Tensor], times: int = 2) -> DataLoader[Any]:
    """Return a loader that yields the same inputs some times."""
    rows = [{k: v[i] for k, v in inputs.items()} for i in range(len(next(iter(inputs.values()))))]
    return DataLoader(rows * times, batch_size=len(rows))  # type: ignore[arg-type]


def trainer(folder: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    """Return a quiet Trainer on the CPU."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    few = {"max_epochs": 2, "num_sanity_val_steps": 0, "enable_checkpointing": False}
    return Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        **{**quiet, **few, **settings},
    )


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of all tensors of a state dict."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    """Return the names in `before` whose tensors are not bitwise the same in `module` now."""
    now = module.state_dict()
    return {name for name, tensor in before.items() if not torch.equal(tensor, now[name])}


class At(Callback):
    """Calls a function in one hook of every epoch or batch."""

    def __init__(self, hook: str, action: Callable[[Trainer, LightningModule], Any]) -> None:
        setattr(self, hook, lambda trainer, module, *_: action(trainer, module))
