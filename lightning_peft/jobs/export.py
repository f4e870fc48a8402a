"""`job=export run=<folder> job.format=peft`: an adapter as other libraries read it."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from lightning_peft.adapter import Adapter
from lightning_peft.config import instantiate
from lightning_peft.errors import ConfigError, near_misses
from lightning_peft.files.adapter_folder import load_adapter
from lightning_peft.files.formats import FORMATS
from lightning_peft.jobs import judging
from lightning_peft.jobs.bases import base_for, require_folder
from lightning_peft.jobs.job import Job
from lightning_peft.jobs.merge import Merge
from lightning_peft.jobs.run_folder import existing, resolved
from lightning_peft.report import open_console

_MERGED = "merged"


@dataclass(frozen=True, kw_only=True)
class Export(Job):
    """Write a run's adapter, or one of `job.adapter`, in a format of another library."""

    format: str = "peft"
    """peft; adapterhub, for bottleneck adapters; or merged: a plain model, as by `job=merge`."""

    adapter: str | None = None
    """Folder of an adapter to export; None takes the run's checkpoint."""

    checkpoint: str = "best"
    """Which one of the run: best, last, or a file."""

    part: str | None = None
    """The method to write of a combination (`lora`); None where there is one."""

    output: str | None = None
    """Folder to write, which must not exist yet; None: named by the format, in the run or beside
    the adapter."""

    def run(self, config: DictConfig) -> None:
        self._check()
        output = self._output(config)
        if self.format == _MERGED:
            places = {"adapter": self.adapter, "checkpoint": self.checkpoint}
            Merge(**places, output=str(output)).run(config)  # type: ignore[arg-type]
            return
        adapter = self._loaded(config)
        adapter.export(output, self.format, self.part)
        console = open_console()
        for file in sorted(output.iterdir()):
            size = file.stat().st_size
            console.print(f"{file}  {size:,} bytes", soft_wrap=True, highlight=False)

    def _check(self) -> None:
        formats = (*FORMATS, _MERGED)
        if self.format not in formats:
            raise ConfigError(
                f"`job.format` must be one of {', '.join(formats)}, but is {self.format!r} instead."
                f"{near_misses(self.format, formats)}"
            )
        if self.format == _MERGED and self.part is not None:
            raise ConfigError(
                f"`job.part` must be null where all is merged, but is {self.part!r} instead."
            )

    def _output(self, config: DictConfig) -> Path:
        if self.output is not None:
            output = Path(self.output).expanduser()
        elif self.adapter is not None:
            folder = Path(self.adapter).expanduser()
            output = folder.with_name(f"{folder.name}-{self.format}")
        else:
            output = existing(config, "export").path / self.format
        if output.exists():
            raise ConfigError(f"`job.output` must not exist yet, but {str(output)!r} does.")
        return output

    def _loaded(self, config: DictConfig) -> Adapter:
        settings = resolved(config)
        if self.adapter is not None:
            folder, source = require_folder(self.adapter), instantiate(settings["model"], "model")
            return load_adapter(base_for(source, folder).eval(), folder)
        checkpoint = judging.checkpoint_of(existing(config, "export"), self.checkpoint)
        module, _ = judging.load(settings, checkpoint)
        return module.adapter
