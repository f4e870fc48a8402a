import copy

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft import LoRA, inject
from lightning_peft.callbacks import FrozenFeatures
from lightning_peft.errors import AdapterError, ConfigError, DataError, TargetError


class Backbone(nn.Module):
    """Counts the rows that it computes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.0)
        self.rows = 0

    def forward(self, x):
        self.rows += len(x)
        hidden = self.dropout(self.first(x).tanh())
        return {"hidden": hidden, "maps": (self.second(hidden),)}


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = Backbone(), nn.Linear(8, 1)
        self.backbone.requires_grad_(False)

    def training_step(self, batch, _):
        maps = self.backbone(batch["x"])["maps"][0]
        return (self.head(maps).squeeze(1) - batch["y"]).square().mean()

    def validation_step(self, batch, index):
        self.log("val/loss", self.training_step(batch, index), batch_size=len(batch["y"]))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.AdamW(self.head.parameters(), lr=0.05)


def loader(rows=10, shuffle=True):
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(3))
    items = [{"x": row, "y": row.sum(), "row_view": f"{rows}:{i}"} for i, row in enumerate(x)]
    return DataLoader(items, batch_size=4, shuffle=shuffle)


def fit(model, *callbacks, epochs=5, **loaders):
    torch.manual_seed(1)
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(model, loaders.get("train", loader()), loader(3, shuffle=False))
    return trainer


def test_each_view_is_computed_once_and_training_is_the_same():
    plain = Model()
    remembering = copy.deepcopy(plain)
    fit(plain)
    fit(remembering, FrozenFeatures("backbone"))
    torch.testing.assert_close(remembering.head.weight, plain.head.weight)
    assert plain.backbone.rows == 5 * 13
    assert remembering.backbone.rows <= 13 + 4  # and one batch to compare


class MaskedBackbone(Backbone):
    """Takes a mask beside what it reads, as the backbones of detectors do."""

    def forward(self, x, mask, scale):
        return super().forward(x * mask * scale)


class Masked(Model):
    def __init__(self, by_name):
        super().__init__()
        self.by_name, self.backbone = by_name, MaskedBackbone().requires_grad_(False)

    def training_step(self, batch, _):
        x = batch["x"]
        given = {"x": x, "mask": (x[:, :1] > 0).float(), "scale": torch.tensor(2.0)}
        found = self.backbone(**given) if self.by_name else self.backbone(*given.values())
        return (self.head(found["maps"][0]).squeeze(1) - batch["y"]).square().mean()


@pytest.mark.parametrize("by_name", [False, True])
def test_masks_are_cut_to_the_new_rows_too(by_name):
    plain = Masked(by_name)
    remembering = copy.deepcopy(plain)
    fit(plain)
    fit(remembering, FrozenFeatures("backbone"))
    torch.testing.assert_close(remembering.head.weight, plain.head.weight)
    assert remembering.backbone.rows <= 13 + 4


def test_the_module_is_as_it_was_after_the_fit():
    model = Model()
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    trainer = fit(model, FrozenFeatures("backbone"), epochs=2)
    assert type(model.backbone) is Backbone
    assert "_peft_memory" not in model.backbone.__dict__
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, before[name])
    rows = model.backbone.rows
    trainer.test(model, loader(3, shuffle=False), verbose=False)
    assert model.backbone.rows == rows + 3


def test_a_part_with_an_adapter_is_refused_by_name():
    model = Model()
    inject(model, LoRA(r=2, targets="backbone.first"))
    with pytest.raises(AdapterError, match=r"carries an adapter at `backbone\.first\."):
        fit(model, FrozenFeatures("backbone"))


def test_a_trained_part_is_refused_by_name():
    model = Model()
    model.backbone.second.bias.requires_grad_(True)
    with pytest.raises(AdapterError, match=r"`backbone\.second\.bias` is trained"):
        fit(model, FrozenFeatures("backbone"))


def test_a_random_part_is_refused_by_name():
    model = Model()
    model.backbone.dropout.p = 0.5
    with pytest.raises(AdapterError, match=r"`backbone\.dropout` drops in train mode"):
        fit(model, FrozenFeatures("backbone"))


def test_rows_that_change_behind_their_view_are_noticed():
    items = [{"x": torch.randn(4), "y": torch.ones(()), "row_view": str(i)} for i in range(8)]

    def changed(rows):
        rows = [row | {"x": row["x"] + torch.randn(4)} for row in rows]
        return torch.utils.data.default_collate(rows)

    with pytest.raises(AdapterError, match="must compute the same for the same `row_view`"):
        fit(Model(), FrozenFeatures("backbone"), train=DataLoader(items, 4, collate_fn=changed))


def test_batches_without_views_are_refused():
    items = [{"x": torch.randn(4), "y": torch.ones(())} for _ in range(4)]
    with pytest.raises(DataError, match="a batch must have `row_view`"):
        fit(Model(), FrozenFeatures("backbone"), train=DataLoader(items, 4))


def test_too_little_memory_is_told():
    model = Model()
    with pytest.raises(ConfigError, match="`gigabytes` must be enough for the features"):
        fit(model, FrozenFeatures("backbone", gigabytes=1e-7))
    assert type(model.backbone) is Backbone  # a fit that fails leaves nothing behind
    with pytest.raises(ConfigError, match="`gigabytes` must be more than 0"):
        FrozenFeatures("backbone", gigabytes=0)


@pytest.mark.parametrize(
    ("part", "message"),
    [("backbon", "fits 0 of Model.* Did you mean `backbone`"), ("*", "fits .* of Model: backbone")],
)
def test_a_name_fits_one_module(part, message):
    with pytest.raises(TargetError, match=message):
        fit(Model(), FrozenFeatures(part))
