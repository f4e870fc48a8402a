"""Loggers whose files outlive an interruption: a resumed run continues what the first one wrote."""

import csv
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lightning_peft.errors import ConfigError
from lightning_peft.redact import redact_arguments


class MetricsFile(Logger):
    """Write metrics as rows of ``<folder>/metrics.csv``, and append to it when a run is resumed.

    Lightning's `CSVLogger` deletes the file of the first run when it is resumed. Here a resumed
    run's rows follow those of the first; where the first run went past its last checkpoint, a
    step stands twice, and the later row is the one that counts.

    Args:
        folder: the run's folder; made on the first write.
        flush_every: rows kept in memory before they are written.
    """

    def __init__(self, folder: str | Path, flush_every: int = 20) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self.flush_every = flush_every
        self._rows: list[dict[str, float]] = []

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run's folder holds the configuration in its own file."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Tensor | float], step: int | None = None) -> None:
        row = {name: float(value) for name, value in metrics.items()}
        self._rows.append({"step": 0 if step is None else step, **row})
        if len(self._rows) >= self.flush_every:
            self.save()

    @rank_zero_only
    def save(self) -> None:
        if not self._rows:
            return
        header, written = self._read()
        columns = sorted({name for row in self._rows for name in row} - set(header))
        if columns:
            self._write([*header, *columns], written)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, [*header, *columns]).writerows(self._rows)
        self._rows = []

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        if not self.path.is_file():
            return [], []
        with self.path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            return list(reader.fieldnames or []), list(reader)

    def _write(self, header: list[str], rows: list[dict[str, str]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A kill between the two lines must not cost what was measured so far.
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, header)
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(self.path)


def wandb_logger(
    folder: str | Path, project: str = "lightning-peft", offline: bool = False, **settings: Any
) -> WandbLogger:
    """Return Lightning's `WandbLogger` for a run's folder; a resumed run continues the same run.

    The run's id is kept in ``<folder>/wandb_run_id``. W&B records the command line; where that
    holds a secret, its record of the machine and the command is switched off.

    Args:
        folder: the run's folder; W&B's own files go below it.
        project: the project on W&B.
        offline: write to disk only; `wandb sync` sends it later.
        settings: further arguments of `wandb.init`, for example `name`, `entity` or `tags`.

    Raises:
        ConfigError: W&B cannot be reached, or nobody is logged in.
    """
    import wandb

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if redact_arguments(sys.argv) != sys.argv:
        settings = {"settings": wandb.Settings(x_disable_meta=True), **settings}
    if offline:
        # `WandbLogger(offline=True)` would set WANDB_MODE for everything else in this process.
        settings["mode"] = "offline"
    logger = WandbLogger(save_dir=folder, project=project, id=_run_id(folder), **settings)
    try:
        # A missing login shall stop the run here, before any model is loaded.
        _ = logger.experiment
    except wandb.Error as error:
        raise ConfigError(
            f"`logger=wandb` must reach W&B, but cannot: {error} "
            "Run `wandb login`, or set `logger.wandb.offline=true` to keep the run on disk."
        ) from error
    return logger


def _run_id(folder: Path) -> str | None:
    file = folder / "wandb_run_id"
    _create_run_id(file)
    # Only rank zero talks to W&B; another rank may look before the file is there.
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None


@rank_zero_only
def _create_run_id(file: Path) -> None:
    if not file.is_file():
        file.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
