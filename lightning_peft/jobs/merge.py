"""`job=merge run=<folder>`: a plain model with the adapter folded into its weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.table import Table

from lightning_peft.adapter import Adapter
from lightning_peft.config import instantiate
from lightning_peft.errors import ConfigError, DataError
from lightning_peft.files.adapter_folder import load_adapter
from lightning_peft.files.merged_folder import write_merged
from lightning_peft.jobs import judging
from lightning_peft.jobs.bases import base_for, require_folder
from lightning_peft.jobs.job import Job
from lightning_peft.jobs.run_folder import RunFolder, resolved
from lightning_peft.merging.certificate import Batch, Certificate
from lightning_peft.merging.merging import measure, merge
from lightning_peft.report import open_console

_DTYPES = ("float32", "float16", "bfloat16")
_BATCHES = 4


@dataclass(frozen=True, kw_only=True)
class Merge(Job):
    """Write a plain model folder: the base with a run's adapter, or one of `job.adapter`, in it."""

    adapter: str | None = None
    """Folder of an adapter to merge; None takes the run's checkpoint."""

    checkpoint: str = "best"
    """Which one of the run: best, last, or a file."""

    output: str | None = None
    """Folder to write, which must not exist yet; None puts `merged/` into the run or beside."""

    dtype: str | None = None
    """Type of the written weights: float32, float16 or bfloat16; None keeps the base's."""

    also: Sequence[str] = ("bfloat16",)
    """Further types in which merging is measured, on a copy of the model."""

    def run(self, config: DictConfig) -> None:
        self._check()
        settings = resolved(config)
        run = RunFolder(Path(config.run)) if config.run is not None else None
        output = self._output(run)
        adapter, inputs, tokenizer = self._loaded(settings, run)
        others = [d for d in self.also if _dtype(d) is not _own_dtype(adapter.model)]
        measured = [measure(adapter, _dtype(d), inputs, tokenizer=tokenizer) for d in others]
        merged = merge(adapter, inputs, tokenizer=tokenizer)
        certificates = [merged.certificate, *measured]
        write_merged(
            merged.model, output, certificates, inputs, tokenizer=tokenizer,
            dtype=_dtype(self.dtype) if self.dtype else None,
        )  # fmt: skip
        _show(certificates, output)

    def _check(self) -> None:
        for name in (*self.also, *([self.dtype] if self.dtype else [])):
            if name not in _DTYPES:
                raise ConfigError(
                    f"`job.dtype` and `job.also` must name {', '.join(_DTYPES)}, but name {name!r}."
                )

    def _output(self, run: RunFolder | None) -> Path:
        if self.output is not None:
            output = Path(self.output).expanduser()
        elif run is not None:
            output = run.path / "merged"
        elif self.adapter is not None:
            output = Path(self.adapter).expanduser().with_name("merged")
        else:
            raise ConfigError(
                "`run` must be the folder of an earlier run, or `job.adapter` that of an adapter: "
                "job=merge run=<folder>."
            )
        if output.exists():
            raise ConfigError(f"`job.output` must not exist yet, but {str(output)!r} does.")
        return output

    def _loaded(
        self, settings: dict[str, Any], run: RunFolder | None
    ) -> tuple[Adapter, list[Batch] | None, Any]:
        source = instantiate(settings["model"], "model")
        if self.adapter is not None:
            folder = require_folder(self.adapter)
            model = base_for(source, folder).eval()
            return load_adapter(model, folder), None, source.tokenizer()
        checkpoint = judging.checkpoint_of(
            RunFolder(Path(run.path if run else "")), self.checkpoint
        )
        module, data = judging.load(settings, checkpoint)
        return module.adapter, _real_inputs(data), source.tokenizer()


def _real_inputs(data: Any) -> list[Batch] | None:
    """Return validation rows of the run, or None where they cannot be read any more."""
    try:
        data.setup("validate")
    except DataError as error:
        open_console().print(f"Compared on sentences of our own: {error}", highlight=False)
        return None
    batches = [batch for batch, _ in zip(data.val_dataloader(), range(_BATCHES), strict=False)]
    return [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]


def _dtype(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found


def _own_dtype(model: Any) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _show(certificates: Sequence[Certificate], output: Path) -> None:
    first, console = certificates[0], open_console()
    title = f"{first.adapter}: logits of {first.rows:,} rows, merged and unmerged"
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("weights", "relative", "limit", "largest", "lost of the adapter", ""):
        table.add_column(column, justify="left" if column in ("weights", "") else "right")
    for found in certificates:
        numbers = (found.relative, found.tolerance, found.absolute)
        cells = [f"{number:.1e}" for number in numbers]
        passed = "within" if found.passed else "beyond"
        table.add_row(found.dtype, *cells, f"{found.lost:.1%}", passed)
    console.print(table)
    console.print(f"written to {output}", soft_wrap=True, highlight=False)
