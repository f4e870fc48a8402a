"""A run's checkpoint on rows with known labels: metrics, label by label, and every prediction."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer

from lightning_peft.callbacks import progress_bar
from lightning_peft.config import instantiate
from lightning_peft.data.known import KnownRows, KnownSplits
from lightning_peft.errors import CheckpointError
from lightning_peft.files.last_checkpoint import last_checkpoint
from lightning_peft.jobs.run_folder import RunFolder
from lightning_peft.jobs.trainers import for_judging
from lightning_peft.module import PEFTModule


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a checkpoint was worth on one split."""

    checkpoint: Path
    split: str
    metrics: dict[str, float]
    """Metrics of the task by name, without the split's prefix."""
    rows: int | None
    """How many the split has; None where nobody can say."""
    inputs: list[Any]
    """What the model read of each row that was predicted."""
    targets: list[Any]
    """What is right for each row."""
    predictions: list[dict[str, Any]]
    """What the task predicts for each of the rows; none of all three for data of a user's own."""
    per_class: dict[str, dict[str, float]]
    """Label -> its scores, for example precision, recall, f1 and the number of texts."""


def checkpoint_of(run: RunFolder, which: str) -> Path:
    """Return a checkpoint of a run: `best`, `last`, or a path.

    Raises:
        CheckpointError: There is none.
    """
    if which == "last":
        return last_checkpoint(run.path)
    path = run.checkpoints / "best.ckpt" if which == "best" else Path(which).expanduser()
    if not path.exists():
        remedy = "it ended before its first validation" if which == "best" else "check the path"
        raise CheckpointError(
            f"`job.checkpoint` must be best, last or a file, but `{path}` does not exist: "
            f"{remedy}; `job.checkpoint=last` takes the newest one."
        )
    return path


def load(settings: Mapping[str, Any], checkpoint: Path) -> tuple[PEFTModule, LightningDataModule]:
    """Return the module of a checkpoint, and the data with its tokenizer and labels."""
    source = instantiate(settings["model"], "model")
    module = PEFTModule.load_from_checkpoint(checkpoint, model=source)
    data = instantiate(settings["data"], "data")
    module.task.equip(data, source)
    return module, data


def judge(
    settings: Mapping[str, Any],
    checkpoint: Path,
    split: str,
    module: PEFTModule,
    data: LightningDataModule,
) -> Judgement:
    """Score a module on the rows of a split, in one process that sees each row once."""
    trainer = for_judging(settings, [progress_bar()])
    data.setup("test" if split == "test" else "validate")
    loader = data.test_dataloader() if split == "test" else data.val_dataloader()
    if split == "test":
        found = trainer.test(module, loader, verbose=False)
    else:
        found = trainer.validate(module, loader, verbose=False)
    inputs, targets, predictions = _row_by_row(trainer, module, data, split, loader)
    metrics = {name.partition("/")[2]: float(value) for name, value in found[0].items()}
    return Judgement(
        checkpoint=checkpoint,
        split=split,
        rows=len(data.targets(split)) if isinstance(data, KnownRows) else None,
        metrics=metrics | module.task.scores(targets, predictions),
        inputs=inputs,
        targets=targets,
        predictions=predictions,
        per_class=module.task.by_group(metrics) or module.task.by_class(targets, predictions),
    )


def has_split(data: LightningDataModule, split: str) -> bool:
    """Whether there are rows for `split`: validation or test."""
    if isinstance(data, KnownSplits):
        return data.has_split(split)
    name = {"validation": "val_dataloader", "test": "test_dataloader"}[split]
    return getattr(type(data), name) is not getattr(LightningDataModule, name)


def _row_by_row(
    trainer: Trainer, module: PEFTModule, data: LightningDataModule, split: str, loader: Any
) -> tuple[list[Any], list[Any], list[dict[str, Any]]]:
    """Return what was read, what is right and what is predicted; nothing where nobody can say."""
    if not isinstance(data, KnownRows) or not module.task.predicts:
        return [], [], []
    asked, numbers = module.task.asked(loader)
    inputs, targets = data.inputs(split), data.targets(split)
    if numbers is not None:
        inputs, targets = [inputs[i] for i in numbers], [targets[i] for i in numbers]
    if not inputs:
        return [], [], []
    readable, predictions = module.task.readable, predictions_of(trainer, module, asked)
    shown = [readable(read, found) for read, found in zip(inputs, predictions, strict=True)]
    return inputs, targets, shown


def predictions_of(trainer: Trainer, module: PEFTModule, loader: Any) -> list[dict[str, Any]]:
    """Return the task's predictions for the rows of a loader, in order."""
    batches = trainer.predict(module, loader) or []
    return [row for batch in batches for row in batch]
