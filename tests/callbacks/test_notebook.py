"""A notebook: cells run twice, edited and run again, and interrupted with the stop button."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_peft import load_adapter
from lightning_peft.carrying.registry import adapters_of
from lightning_peft.errors import AdapterError

MODEL = """
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import LoRA, PEFT, inject

class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, index):
        if self.global_step == stop_at:
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05)

x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
data = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=8)
stop_at = None
model = Classifier()
"""

TRAIN = """
peft = PEFT(LoRA(r=2, targets="body.0"), train="head", head=False)
trainer = Trainer(
    callbacks=[peft], max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
)
trainer.fit(model, data)
"""

BASE = ("body.0.weight", "body.0.bias")


class Notebook:
    """Runs the source of cells in one namespace, as a kernel does."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {"__name__": "__main__"}

    def run(self, cell: str) -> None:
        exec(compile(cell, "<cell>", "exec"), self.names)

    def __getitem__(self, name: str) -> Any:
        return self.names[name]


@pytest.fixture
def notebook() -> Notebook:
    opened = Notebook()
    opened.run(MODEL)
    return opened


def _base(notebook: Notebook) -> dict[str, torch.Tensor]:
    state = notebook["model"].state_dict()
    return {name: state[name].clone() for name in BASE}


def test_a_training_cell_run_twice_injects_once_and_trains_on(notebook: Notebook) -> None:
    before = _base(notebook)
    notebook.run(TRAIN)
    adapter = notebook["peft"].adapter
    first = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    notebook.run(TRAIN)

    assert notebook["peft"].adapter is adapter
    assert list(adapters_of(notebook["model"])) == ["default"]
    second = adapter.state_dict()
    assert first.keys() == second.keys()
    assert all(not torch.equal(first[name], second[name]) for name in first)
    for name, tensor in _base(notebook).items():
        assert torch.equal(tensor, before[name]), name
    assert isinstance(notebook["model"], notebook["Classifier"])


def test_all_cells_run_twice_start_from_a_fresh_model(notebook: Notebook) -> None:
    notebook.run(TRAIN)
    first = notebook["peft"].adapter.state_dict()
    torch.manual_seed(0)
    notebook.run(MODEL)
    notebook.run(TRAIN)
    assert notebook["peft"].adapter.state_dict().keys() == first.keys()


def test_an_edited_cell_names_the_remedy_and_the_remedy_works(notebook: Notebook) -> None:
    before = notebook["model"](notebook["x"])
    notebook.run(TRAIN)
    trained = {n: t.clone() for n, t in notebook["peft"].adapter.state_dict().items()}
    kept = notebook["peft"].adapter
    edited = TRAIN.replace("r=2", "r=4")
    with pytest.raises(AdapterError, match=r"LoRA\(r=2.*remove"):
        notebook.run(edited)
    for name, tensor in kept.state_dict().items():
        assert torch.equal(tensor, trained[name]), name

    kept.remove()
    assert torch.equal(notebook["model"](notebook["x"]), before)
    notebook.run(edited)
    assert notebook["peft"].adapter.methods[0].r == 4


def test_an_inject_cell_run_twice_leaves_the_first_adapter(notebook: Notebook) -> None:
    cell = 'adapter = inject(model, LoRA(r=2, targets="body.0"), head=False)'
    notebook.run(cell)
    first = notebook["adapter"]
    with pytest.raises(AdapterError, match=r"remove\(\)"):
        notebook.run(cell)
    assert notebook["adapter"] is first
    assert len(first.parameters()) == 2


def test_an_interrupt_keeps_the_adapter(notebook: Notebook, tmp_path: Path) -> None:
    before = _base(notebook)
    handler = signal.getsignal(signal.SIGINT)
    notebook.run("stop_at = 5")
    with pytest.raises(SystemExit):  # what Lightning makes of the stop button; a kernel survives it
        notebook.run(TRAIN)
    assert signal.getsignal(signal.SIGINT) == handler

    adapter = notebook["peft"].adapter
    lora_b = adapter.state_dict()["body.0.lightning_peft.default_lora.lora_B"]
    assert lora_b.abs().max() > 0
    logits = notebook["model"](notebook["x"])
    folder = adapter.save(tmp_path / "adapter")
    interrupted = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}

    notebook.run("stop_at = None")
    notebook.run(TRAIN)
    assert notebook["peft"].adapter is adapter
    assert not torch.equal(adapter.state_dict()["head.weight"], interrupted["head.weight"])
    for name, tensor in _base(notebook).items():
        assert torch.equal(tensor, before[name]), name

    notebook.run(MODEL)
    load_adapter(notebook["model"], folder)
    assert torch.equal(notebook["model"](notebook["x"]), logits)
