"""Train a tiny BERT by LoRA on two processes, whole and interrupted, and write what came out.

Run as a script: ``python train.py FOLDER (ddp|file|shards):DTYPE …``. Lightning starts the other
process. Rank 0 writes ``results.json`` and ``trained.pt`` into a folder for each kind.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from safetensors.torch import load_file
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

from lightning_peft import PEFT, LoRA, last_checkpoint
from lightning_peft.errors import ConfigError
from lightning_peft.strategies.checks import assert_same_on_all_ranks
from lightning_peft.strategies.model_parallel import PEFTModelParallelStrategy

VOCABULARY, TOKENS, ROWS = 40, 6, 24


class Classifier(pl.LightningModule):
    """A foreign LightningModule: nothing in it knows of adapters."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=TOKENS,
            num_labels=3,
        )
        self.model = BertForSequenceClassification(config).to(dtype).train()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.model(input_ids=batch[0], labels=batch[1]).loss.float()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 10))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=generator)
    return DataLoader(TensorDataset(tokens, tokens[:, 0] % 3), batch_size=2, shuffle=True)


def strategy(kind: str) -> Any:
    if kind == "ddp":
        return "ddp"
    if kind == "none":
        return "auto"
    return PEFTModelParallelStrategy(save_distributed_checkpoint=kind == "shards")


def fit(
    kind: str,
    processes: int,
    dtype: torch.dtype,
    epochs: int,
    folder: Path | None,
    callbacks: Sequence[pl.Callback] = (),
) -> tuple[Classifier, pl.Trainer]:
    """Train for some epochs, from the last checkpoint in `folder` when one is there."""
    pl.seed_everything(3, verbose=False)  # the order of the rows depends on it
    module, callbacks = Classifier(dtype), [PEFT(LoRA(r=2, dropout=0.1)), *callbacks]
    if folder is not None:
        callbacks.append(pl.callbacks.ModelCheckpoint(folder, save_last=True))
    resume = folder is not None and folder.exists()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=strategy(kind),
        max_epochs=epochs,
        callbacks=callbacks,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if resume:
        torch.manual_seed(99)  # dropout must go on from the checkpoint's random states
    trainer.fit(module, data(), ckpt_path=last_checkpoint(folder) if resume else None)
    return module, trainer


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def state(module: Classifier, trained: bool) -> dict[str, Tensor]:
    return {n: whole(p) for n, p in module.named_parameters() if p.requires_grad == trained}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def gathered(values: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    ranks: list[Any] = [values]
    if distributed.is_initialized():
        ranks = [None] * distributed.get_world_size()
        distributed.all_gather_object(ranks, values)
    return ranks


def exported(folder: Path, trained: dict[str, Tensor]) -> bool:
    """Return whether the final adapter holds what was trained."""
    adapter = load_file(folder / "adapter_model.safetensors")
    kept = [t for t in trained.values() if any(torch.equal(t, other) for other in adapter.values())]
    return len(kept) == len(trained) == len(adapter)


def difference_between_ranks(rank: int) -> str:
    assert_same_on_all_ranks("the same", "the configuration")
    try:
        assert_same_on_all_ranks(f"lr={rank}", "the configuration")
    except ConfigError as error:
        return str(error)
    return ""


def main(folder: Path, kind: str, dtype: torch.dtype) -> None:
    continuous, trainer = fit(kind, 2, dtype, epochs=4, folder=None)
    fit(kind, 2, dtype, epochs=2, folder=folder / "run")
    trainer.strategy.barrier()  # the newest checkpoint is looked for before the run begins
    resumed, trainer = fit(kind, 2, dtype, epochs=4, folder=folder / "run")

    first = Classifier(dtype).state_dict()
    trained, base = state(continuous, trained=True), state(continuous, trained=False)
    ranks = gathered(trained)
    sharded = [isinstance(p, DTensor) for p in continuous.parameters()]
    results = {
        "world": trainer.world_size,
        "steps": trainer.global_step,
        "base unchanged": [same(b, {n: first[n] for n in b}) for b in gathered(base)],
        "trained equal": [same(ranks[0], other) for other in ranks],
        "trained unchanged": [n for n, t in trained.items() if torch.equal(t, first.get(n, t * 0))],
        "resume exact": same(state(resumed, trained=True), trained),
        "exported": exported(folder / "run" / "adapter", state(resumed, trained=True)),
        "refused": difference_between_ranks(trainer.global_rank),
        "sharded": [any(sharded), all(sharded)],
        "trained bytes": sum(t.numel() * t.element_size() for t in trained.values()),
    }
    if trainer.is_global_zero:
        torch.save(trained, folder / "trained.pt")
        (folder / "results.json").write_text(json.dumps(results))


def change_strategy(folder: Path) -> None:
    """Go on with FSDP2 where DDP left off, and with DDP after that."""
    if distributed.get_rank() == 0:
        shutil.copytree(folder / "ddp" / "run", folder / "changed")
    distributed.barrier()
    steps = []
    for kind, epochs in (("file", 5), ("ddp", 6)):
        _, trainer = fit(kind, 2, torch.float32, epochs, folder / "changed")
        steps += [int(entry["step"]) for entry in trainer.optimizers[0].state.values()]
    (folder / "changed" / "steps.json").write_text(json.dumps(sorted(set(steps))))


if __name__ == "__main__":
    root = Path(sys.argv[1])
    for run in sys.argv[2:]:
        kind, dtype = run.split(":")
        main(root / kind, kind, getattr(torch, dtype))
    change_strategy(root)
