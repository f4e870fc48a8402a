"""`job=predict run=<folder> data.path=new.csv`: write what a run says of new rows."""

import csv
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from omegaconf import DictConfig

from lightning_peft.callbacks import progress_bar
from lightning_peft.config import TARGET, find_target
from lightning_peft.data.known import KnownRows
from lightning_peft.errors import ConfigError
from lightning_peft.jobs import judging
from lightning_peft.jobs.beside import Beside, by_name
from lightning_peft.jobs.job import Job
from lightning_peft.jobs.run_folder import existing, resolved
from lightning_peft.jobs.trainers import for_judging
from lightning_peft.report import open_console

_FORMATS = (".csv", ".jsonl")
Draw = Callable[..., None]


@dataclass(frozen=True, kw_only=True)
class Predict(Job):
    """Write the rows of `data.path` with what the task predicts for each."""

    checkpoint: str = "best"
    """Which one: best, last, or a file."""

    output: str | None = None
    """File to write, .csv or .jsonl; None puts `<input>.predictions.<the task's>` beside it."""

    overwrite: bool = False
    """Replace the file when it exists."""

    adapters: Sequence[str] = ()
    """Folders of further adapters of the same base, whose predictions stand beside the run's."""

    def run(self, config: DictConfig) -> None:
        settings, run = resolved(config), existing(config, "predict")
        task: Any = find_target(settings["task"][TARGET])
        output = self._output(settings["data"].get("path"), run.path, task.suffix)
        module, data = judging.load(settings, judging.checkpoint_of(run, self.checkpoint))
        predicting: Any = module
        readable, pictures = module.task.readable, output.with_suffix(".pictures")
        draw: Draw | None = partial(module.task.draw, folder=pictures)
        if self.adapters:
            predicting = Beside(module, by_name(self.adapters, module.adapter.name))
            readable, draw = predicting.readable, None
        data.setup("predict")
        rows, inputs = _rows(data)
        with _replacing(output) as file:
            writer = RowWriter(file, output.suffix, rows, inputs, readable, draw)
            trainer = for_judging(settings, [writer, progress_bar()])
            trainer.predict(predicting, data.predict_dataloader(), return_predictions=False)
        console = open_console()
        console.print(f"{writer.written:,} rows written to {output}", soft_wrap=True)
        if pictures.is_dir():
            console.print(f"pictures in {pictures}", soft_wrap=True)

    def _output(self, source: Any, folder: Path, suffix: str) -> Path:
        while isinstance(source, dict):  # by split, and parallel text by side
            source = next((source[k] for k in ("source", "predict", "test") if k in source), None)
        # A folder can be given as `images/`, and several files as `part*.csv`.
        beside = re.sub(r"[*?\[\]]", "", f"{source}".rstrip("/"))
        default = f"{beside}.predictions{suffix}" if source else folder / f"predictions{suffix}"
        output = Path(self.output or default).expanduser()
        if output.suffix not in _FORMATS:
            raise ConfigError(
                f"`job.output` must end in {', '.join(_FORMATS)}, but is {str(output)!r} instead."
            )
        if output.exists() and not self.overwrite:
            raise ConfigError(
                f"`job.output` must not exist yet, but {str(output)!r} does: choose another, or "
                f"replace it with `job.overwrite=true`."
            )
        if not output.parent.is_dir():
            raise ConfigError(f"`job.output` must lie in a folder, but {output.parent} is none.")
        return output


class RowWriter(BasePredictionWriter):
    """Write each batch's predictions beside the rows that they belong to, as they come.

    A prediction whose name is that of a column gets the prefix `predicted_`.

    Args:
        file: An open text file.
        suffix: `.csv` or `.jsonl`.
        rows: The rows in the order of the predictions.
        inputs: What the model reads of them.
        readable: Completes a prediction by what was read.
        draw: Leaves pictures: takes what was read, the prediction, and the row's number from 1.
    """

    def __init__(
        self,
        file: IO[str],
        suffix: str,
        rows: Iterable[Mapping[str, Any]],
        inputs: Iterable[Any],
        readable: Callable[[Any, dict[str, Any]], Mapping[str, Any]],
        draw: Draw | None = None,
    ) -> None:
        super().__init__("batch")
        self.written = 0
        self._file, self._readable, self._draw = file, readable, draw
        self._rows, self._inputs = iter(rows), iter(inputs)
        self._as_csv = suffix == ".csv"
        self._columns: list[str] = []

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        for predicted in prediction:
            row, read = next(self._rows), next(self._inputs)
            complete = self._readable(read, predicted)
            self._write(_beside(row, complete))
            self.written += 1
            if self._draw is not None:
                self._draw(read, complete, number=self.written)

    def _write(self, row: dict[str, Any]) -> None:
        if not self._as_csv:
            self._file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
            return
        writer = csv.writer(self._file)
        if not self._columns:
            self._columns = list(row)
            writer.writerow(self._columns)
        writer.writerow([_cell(row[name]) for name in self._columns])


def _rows(data: LightningDataModule) -> tuple[Iterable[Mapping[str, Any]], Iterable[Any]]:
    """Return the rows to predict and what the model reads of them; of own data nothing is known."""
    if isinstance(data, KnownRows):
        return data.predict_rows(), data.inputs("predict")
    return itertools.repeat({}), itertools.repeat(None)


def _beside(row: Mapping[str, Any], prediction: Mapping[str, Any]) -> dict[str, Any]:
    named = {f"predicted_{k}" if k in row else k: v for k, v in _flat(prediction).items()}
    return {**row, **named}


def _flat(prediction: Mapping[str, Any]) -> dict[str, Any]:
    """Return `{"probabilities": {"good": 0.9}}` as `{"probability_good": 0.9}`."""
    flat: dict[str, Any] = {}
    for name, value in prediction.items():
        if isinstance(value, Mapping):
            prefix = "probability" if name == "probabilities" else name
            flat |= {f"{prefix}_{key}": item for key, item in _flat(value).items()}
        else:
            flat[name] = value
    return flat


def _cell(value: Any) -> Any:
    """Return what is more than one value as JSON."""
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return value


@contextmanager
def _replacing(path: Path) -> Iterator[IO[str]]:
    """Open a file beside `path` that takes its place when all rows are written."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8", newline="") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
