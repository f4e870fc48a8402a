"""Track a fine-tuning run on W&B: its configuration, its size, and the adapter as an artifact."""

import itertools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch.distributed.tensor import DTensor

from lightning_peft.callbacks.summary import trained_size
from lightning_peft.carrying.registry import adapters_of
from lightning_peft.files.adapter_folder import CONFIG
from lightning_peft.redact import redact


class WandbAdapter(Callback):
    """Send what W&B should know about an adapter; without a `WandbLogger` do nothing.

    Before training, the run's configuration (secrets hidden) and the number and bytes of the
    trained parameters; after it, the adapter's folder as an artifact of type ``adapter`` with the
    base's fingerprint in its metadata. Works offline; checkpoints are never uploaded.

    Args:
        config: the resolved configuration of the run, or None.
        artifact: log the adapter as it is when the fit ends. Turn it off where the best adapter is
            exported later, and call `log_adapter` with that folder.

    Example::

        Trainer(logger=WandbLogger(), callbacks=[PEFT(LoRA()), WandbAdapter()])
    """

    def __init__(self, config: Mapping[str, Any] | None = None, artifact: bool = True) -> None:
        self.config = redact(config or {})
        self.artifact = artifact

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parameters, size = trained_size(pl_module)
        for run in _runs(trainer):
            run.config.update(self.config, allow_val_change=True)
            run.summary.update({"adapter/parameters": parameters, "adapter/bytes": size})

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not (self.artifact and _runs(trainer)):
            return
        for name, adapter in adapters_of(pl_module).items():
            if any(isinstance(parameter, DTensor) for parameter in adapter.parameters()):
                rank_zero_warn(
                    f"Adapter `{name}` is sharded and was not logged to W&B: save it from a "
                    "checkpoint, then call `log_adapter` with its folder."
                )
                continue
            with tempfile.TemporaryDirectory() as folder:
                log_adapter(trainer, adapter.save(Path(folder) / name))


def log_adapter(trainer: Trainer, folder: str | Path) -> None:
    """Log a saved adapter folder, or several in one, as artifacts to each W&B run of `trainer`.

    Args:
        trainer: its `WandbLogger`s are used; without any, nothing happens.
        folder: what `Adapter.save` or `AdapterGroup.save` wrote.
    """
    for run, config in itertools.product(_runs(trainer), sorted(Path(folder).rglob(CONFIG))):
        import wandb

        settings = json.loads(config.read_text(encoding="utf-8"))
        artifact = wandb.Artifact(
            f"{settings['name']}-{run.id}", type="adapter", metadata=redact(settings)
        )
        artifact.add_dir(str(config.parent))
        # Not waited for: offline there is nothing to wait for, and `wait()` raises.
        run.log_artifact(artifact)


def _runs(trainer: Trainer) -> list[Any]:
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, WandbLogger)]
