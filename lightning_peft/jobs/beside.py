"""Predictions of several adapters for the same rows: columns that begin with an adapter's name."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule

from lightning_peft.carrying.switching import switch
from lightning_peft.errors import ConfigError
from lightning_peft.files.adapter_folder import labels_of, load_adapter
from lightning_peft.module import PEFTModule


class Beside(LightningModule):
    """Predicts with a run's own adapter, and with others on the same base.

    Args:
        module: a run's.
        folders: saved adapters, by the name that their columns begin with.
    """

    def __init__(self, module: PEFTModule, folders: dict[str, Path]) -> None:
        super().__init__()
        self.module, self.names = module, tuple(folders)
        switch(module.model, ())  # what the run trained in place is no part of the others' base
        for name, folder in folders.items():
            _check_labels(module.model, name, folder)
            load_adapter(module.model, folder, name).deactivate()
        switch(module.model, module.adapter.name)

    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
        """Return for each row what the run's adapter predicts, and below names what others do."""
        rows = self.module.predict_step(batch, batch_idx)
        for name in self.names:
            switch(self.module.model, name)
            others = self.module.predict_step(batch, batch_idx)
            rows = [{**row, name: other} for row, other in zip(rows, others, strict=True)]
        switch(self.module.model, self.module.adapter.name)
        return rows

    def readable(self, given: Any, prediction: dict[str, Any]) -> dict[str, Any]:
        """Return each adapter's prediction, completed by what was read."""
        read = self.module.task.readable
        own = {key: value for key, value in prediction.items() if key not in self.names}
        return {**read(given, own), **{n: dict(read(given, prediction[n])) for n in self.names}}


def _check_labels(model: Any, name: str, folder: Path) -> None:
    own = tuple(str(label) for label in (getattr(model.config, "id2label", None) or {}).values())
    theirs = labels_of(folder)
    if theirs and theirs != own:
        raise ConfigError(
            f"`job.adapters` must name adapters that tell {', '.join(own)}, as the run does, but "
            f"`{name}` tells {', '.join(theirs)}: predict with its own run."
        )


def by_name(folders: Sequence[str], taken: str) -> dict[str, Path]:
    """Return folders of adapters by a name: the folder's own, or that of the run it lies in.

    Raises:
        ConfigError: two have the same name, or one that of the run's adapter, `taken`.
    """
    found: dict[str, Path] = {}
    for text in folders:
        path = Path(text).expanduser()
        own = path.resolve().parent.name if path.name == "adapter" else path.name
        name = re.sub(r"[^A-Za-z0-9_-]", "-", own)
        if name in found or name == taken or not name.strip("_-"):
            raise ConfigError(
                f"`job.adapters` must name folders with names of their own, but `{text}` gives "
                f"`{name}`, which is taken or empty: rename it."
            )
        found[name] = path
    return found
