from collections import Counter
from itertools import pairwise

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from lightning_peft.data.by_length import ByLength, lengths_of

LENGTHS = [
    int(n) for n in torch.randint(3, 90, (1003,), generator=torch.Generator().manual_seed(0))
]


def batches(sampler):
    rows = list(sampler)
    return [rows[i : i + 10] for i in range(0, len(rows), 10)]


def test_every_row_comes_once_in_batches_of_like_lengths():
    found = batches(ByLength(LENGTHS, 10, seed=0))
    assert Counter(row for batch in found for row in batch) == Counter(range(1003))
    padded = sum(max(LENGTHS[row] for row in batch) * len(batch) for batch in found)
    assert padded < 1.05 * sum(LENGTHS)
    assert len(found[-1]) == 3


def test_the_order_follows_the_seed_and_the_epoch_alone():
    one, other = ByLength(LENGTHS, 10, seed=1), ByLength(LENGTHS, 10, seed=1)
    first = list(one)
    torch.rand(1)
    assert list(other) == first
    one.set_epoch(1)
    assert list(one) != first
    one.set_epoch(0)
    assert list(one) == first
    assert list(ByLength(LENGTHS, 10, seed=2)) != first


def test_neighbouring_batches_are_not_of_like_lengths():
    longest = [max(LENGTHS[row] for row in b) for b in batches(ByLength(LENGTHS, 10, seed=0))]
    steps = [abs(a - b) for a, b in pairwise(longest)]
    assert sum(steps) / len(steps) > 10


def test_a_row_of_several_pieces_is_as_long_as_its_longest():
    assert lengths_of([[1, 2, 3], [4]]) == [3, 1]
    assert lengths_of([[[1, 2], [3]], [[4]]]) == [2, 1]


class Seen(LightningModule):
    """Notes the rows of each epoch."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.rows = {}

    def training_step(self, batch, batch_idx):
        self.rows.setdefault(self.current_epoch, []).extend(batch.tolist())
        return self.layer(batch[:, None].float()).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(folder, epochs, checkpoint=None):
    module = Seen()
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    rows = torch.arange(100)
    loader = DataLoader(rows, 10, sampler=ByLength(LENGTHS[:100], 10, seed=0))
    trainer.fit(module, loader, ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module.rows


def test_a_resumed_run_sees_the_rows_of_an_uninterrupted_one(tmp_path):
    whole = fit(tmp_path, 3)
    assert whole[0] != whole[1] != whole[2]
    fit(tmp_path, 1)
    assert fit(tmp_path, 3, tmp_path / "last.ckpt") == {1: whole[1], 2: whole[2]}
