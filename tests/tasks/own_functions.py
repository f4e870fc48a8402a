"""Functions as a user writes them for a task of their own."""

import torch
from lightning.pytorch import LightningDataModule
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

from lightning_peft.tasks.task import StepOutput, model_inputs


def loss(model, batch):
    scores = model(**model_inputs(batch)).logits.squeeze(-1)
    return mse_loss(scores, batch["labels"]), scores, batch["labels"]


def as_step(model, batch):
    return StepOutput(*loss(model, batch))


def alone(model, batch):
    return loss(model, batch)[0]


def by_row(model, batch):
    return model(**model_inputs(batch)).logits.square().squeeze(-1)


def pair(model, batch):
    return loss(model, batch)[:2]


def number(model, batch):
    return alone(model, batch).item()


def broken(model, batch):
    return alone(model, batch) * float("nan")


def predict(model, batch):
    return model(**model_inputs(batch)).logits.squeeze(-1)


class Scores(LightningDataModule):
    """Token numbers with a score each: how many of them are even."""

    def __init__(self, rows: int = 32, batch_size: int = 8) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(5, 20, (rows, 6), generator=draw)
        scores = (ids % 2 == 0).float().mean(1)
        self.rows = [{"input_ids": i, "labels": s} for i, s in zip(ids, scores, strict=True)]
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(self.rows, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.rows, batch_size=self.batch_size)

    def predict_dataloader(self):
        rows = [{"input_ids": row["input_ids"]} for row in self.rows[:5]]
        return DataLoader(rows, batch_size=self.batch_size)
