"""Let the disk refuse on one process, in the second save of a run on two processes.

Run as a script: ``python fail.py FOLDER (file|shards|ddp):RANK …``. A run that fails on both
processes at once is followed by the next; under DDP one process fails, and both must end.
"""

import errno
import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from train import fit

from lightning_peft.errors import PEFTError

FSYNC = os.fsync


class FillTheDisk(pl.Callback):
    """In the second epoch no byte reaches the disk of one process."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1 and trainer.global_rank == self.rank:
            os.fsync = refuse

    def on_exception(self, *_: object) -> None:
        os.fsync = FSYNC


def refuse(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


for run in sys.argv[2:]:
    kind, rank = run.split(":")
    folder = Path(sys.argv[1]) / kind / "run"
    try:
        fit(kind, 2, torch.float32, 3, folder, [FillTheDisk(int(rank))])
    except PEFTError as error:
        print(f"{kind}: {type(error).__name__}: {error}\n", end="", flush=True)
        if kind == "ddp":
            raise
