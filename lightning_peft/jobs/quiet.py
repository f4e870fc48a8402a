"""What Lightning says on every run and that no user of the command line can act on."""

import logging
import warnings

_LOGGERS = ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero")
_ROUTINE = (
    "GPU available",
    "TPU available",
    "💡 Tip",
    "Loading `train_dataloader`",
    "`Trainer.fit` stopped",
)
_WARNINGS = (
    # torch and Lightning disagree about a name.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    # A frozen base is in eval mode on purpose: its dropout would be noise.
    r"Found \d+ module\(s\) in eval mode",
    # A resumed run writes where it wrote before.
    r"Checkpoint directory .* exists and is not empty",
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    # On two cores, more workers are slower; who has more sets data.num_workers.
    r"The '\w+' does not have many workers",
)


def quieten() -> None:
    """Hide Lightning's routine notes and warnings for the rest of this process."""
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_is_news)
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=f".*{message}")


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_ROUTINE)
