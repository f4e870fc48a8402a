"""A progress bar where a person watches, and a line per epoch where a file is written."""

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from rich.console import Console


def progress_bar() -> ProgressBar:
    """Return a rich progress bar for a terminal or notebook, and plain lines for anything else.

    A bar redraws itself with control codes, which a log file or a CI page shows as noise, or
    as nothing before the end.
    """
    console = Console()
    if not (console.is_terminal or console.is_jupyter):
        return EpochLines()
    theme = RichProgressBarTheme(progress_bar="cyan", progress_bar_finished="green", metrics="none")
    # Lightning's default of a hundred frames a second takes time from training on few cores.
    return RichProgressBar(refresh_rate=2, theme=theme)


class EpochLines(ProgressBar):
    """Print a line at the end of each epoch, with the step, the seconds and the metrics."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._start = 0.0

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        if self._enabled:
            print(*args, **{"flush": True, **kwargs})  # noqa: T201

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        last = "" if trainer.max_epochs in (None, -1) else f"/{trainer.max_epochs}"
        seconds = f"{time.monotonic() - self._start:.0f} s"
        parts = [f"epoch {trainer.current_epoch + 1}{last}", f"step {trainer.global_step}", seconds]
        self.print(" · ".join(parts + _readable(trainer)))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.print(" · ".join(["test", *_readable(trainer)]))


def _readable(trainer: Trainer) -> list[str]:
    return [
        f"{name} {float(value):.4g}"
        for name, value in sorted(trainer.callback_metrics.items())
        if not name.endswith("_step")
    ]
