"""`job=compare`: several methods on the same data with the same budget, side by side."""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lightning_peft.comparison import (
    Comparison,
    Contender,
    Run,
    plot_comparison,
    print_comparison,
    write_comparison,
)
from lightning_peft.errors import (
    CheckpointError,
    ConfigError,
    MissingExtraError,
    RunError,
    near_misses,
)
from lightning_peft.files.last_checkpoint import last_checkpoint
from lightning_peft.jobs import saved
from lightning_peft.jobs.child import run_command
from lightning_peft.jobs.conf import in_use, key_of
from lightning_peft.jobs.job import Job
from lightning_peft.jobs.plans import Plan, name_of, plan
from lightning_peft.jobs.run_folder import make, resolved
from lightning_peft.report import Result, open_console


@dataclass(frozen=True, kw_only=True)
class Compare(Job):
    """Train with each method and each seed in a process of its own, and show all in one table.

    What is finished is not run again, and what was interrupted is resumed, when the same command
    is given with the same `folder`. A run that fails is named in the table and stops no other.
    """

    methods: Sequence[Any] = ("lora", "full")
    """Contenders: options of `method`, or lists of those that are trained together."""
    seeds: Sequence[int] | None = None
    """Each contender is trained once with each; None: the one seed of the configuration."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Settings of single contenders by name, beside those for all."""
    baseline: bool = True
    """Also measure the frozen base and a new head, once."""

    def run(self, config: DictConfig) -> None:
        self._check(config)
        plans = list(self._plans(config))
        folder, console = self._folder(config), open_console()
        for one in plans:
            one.check_same(one.folder(folder))
        runs: list[tuple[str, Run]] = []
        try:
            for number, one in enumerate(plans, 1):
                place = f"[{number}/{len(plans)}] {one.name}, seed {one.seed}"
                console.print(place, markup=False, highlight=False)
                made = _made(one, one.folder(folder))
                runs += made
                for _, run in made:
                    console.print(f"  {_told(run)}", markup=False, highlight=False, soft_wrap=True)
        except KeyboardInterrupt:
            console.print(f"Interrupted. Go on with the same command and folder={folder}")
            raise
        _conclude(self._title(config), folder, runs)

    def _check(self, config: DictConfig) -> None:
        if config.run is not None:
            raise ConfigError("`run` must be left out for job=compare, which makes new runs.")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                f"job=compare must be started as one process, but was as "
                f"{os.environ['WORLD_SIZE']}: each of its runs starts `trainer.devices` processes."
            )
        if "method" in map(key_of, HydraConfig.get().overrides.task):
            raise ConfigError("`method` must be left out for job=compare: give `job.methods`.")
        self._check_methods()
        _different("job.seeds", self._seeds(config))

    def _check_methods(self) -> None:
        known = in_use().options("method")
        for one in self.methods:
            for method in one if isinstance(one, list) else [one]:
                if method not in known:
                    close = near_misses(str(method), known)
                    raise ConfigError(
                        f"`job.methods` must name options of `method`, but has {method!r}.{close}"
                    )
        names = [name_of(one) for one in self.methods]
        _different("job.methods", names)
        for name in self.overrides:  # a recipe may have some for contenders that are left out
            if name not in (*names, *known):
                raise ConfigError(
                    f"`job.overrides` must name contenders ({', '.join(names)}), but has "
                    f"{name!r}.{near_misses(name, names)}"
                )

    def _seeds(self, config: DictConfig) -> list[int]:
        return [config.seed] if self.seeds is None else list(self.seeds)

    def _plans(self, config: DictConfig) -> Iterator[Plan]:
        seeds = self._seeds(config)
        if self.baseline:
            yield plan(config, None, seeds[0], {})
        for one in self.methods:
            for seed in seeds:
                yield plan(config, one, seed, self.overrides.get(name_of(one), {}))

    def _title(self, config: DictConfig) -> str:
        return config.title or "-".join(["compare", *map(name_of, self.methods)])

    def _folder(self, config: DictConfig) -> Path:
        """Return the folder of an earlier comparison, or make a new one."""
        given = Path(config.folder).expanduser() if config.folder else None
        if given is None or not given.exists():
            return make({**resolved(config), "title": self._title(config)})
        if not given.is_dir() or (given / saved.CONFIG).exists():
            raise ConfigError(
                f"`folder` must be new or of an earlier comparison, but {str(given)!r} is neither."
            )
        return given


def _different(setting: str, values: Sequence[Any]) -> None:
    if not values or len(set(values)) < len(values):
        raise ConfigError(f"`{setting}` must be one or more, all different, but is {values}.")


def _made(one: Plan, folder: Path) -> list[tuple[str, Run]]:
    """Make a run, unless it is there; return what it was worth, or why it failed, by name."""
    error, report = "", _report(folder)
    if report is None:
        folder.parent.mkdir(exist_ok=True)
        log = folder.with_name(f"{folder.name}.log")
        error = run_command(_arguments(one, folder), log, _show)
        report = _report(folder)
    if error or report is None:
        why = error or "it ended without a report"
        return [(one.name, Run(folder=folder, seed=one.seed, error=why))]
    results = report["results"] if one.name == "baseline" else report["results"][-1:]
    known = {part.name for part in dataclasses.fields(Result)}
    return [
        (
            result["name"] if one.name == "baseline" else one.name,
            Run(
                folder=folder,
                seed=one.seed,
                metric=report["metric"],
                result=Result(**{k: v for k, v in result.items() if k in known}),
            ),
        )
        for result in results
    ]


def _arguments(one: Plan, folder: Path) -> list[str]:
    """Return the command that makes a run, or that takes it up from its last checkpoint."""
    users = in_use().users
    flags = ["--config-dir", str(users[0])] if users else []
    with contextlib.suppress(CheckpointError):
        last_checkpoint(folder)
        return [*flags, "job=resume", f"run={folder}", "job.baseline=false"]
    if folder.exists():  # ended before its first checkpoint
        shutil.rmtree(folder)
    return [*flags, *one.arguments, f"folder={folder}"]


def _report(folder: Path) -> dict[str, Any] | None:
    """Return the report of a finished run."""
    try:
        found = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return dict(found)


def _show(line: str) -> None:
    if line.startswith("epoch "):
        open_console().print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


def _told(run: Run) -> str:
    """Return how a run ended, in one line."""
    if run.result is None:
        return f"failed: {run.error} (see {run.folder}.log)"
    values = {"val": run.result.validation, "test": run.result.test}
    scores = [f"{s} {run.metric} {v[run.metric]:.4f}" for s, v in values.items() if run.metric in v]
    return " · ".join([run.result.name, *scores, f"{run.result.seconds:.0f} s"])


def _conclude(title: str, folder: Path, runs: Sequence[tuple[str, Run]]) -> None:
    """Write and print the table.

    Raises:
        RunError: A run failed.
    """
    by_name: dict[str, list[Run]] = {}
    for name, run in runs:
        by_name.setdefault(name, []).append(run)
    found = Comparison(
        title=title,
        metric=next((run.metric for _, run in runs if run.metric), ""),
        contenders=[Contender(name=name, runs=own) for name, own in by_name.items()],
    )
    files = write_comparison(folder, found)
    with contextlib.suppress(MissingExtraError):
        files.append(plot_comparison(folder / "compare.png", found))
    print_comparison(found)
    names = ", ".join(file.name for file in files)
    open_console().print(f"written to {folder}: {names}", soft_wrap=True, highlight=False)
    if found.failed:
        failed = ", ".join(dict.fromkeys(name for name, _ in found.failed))
        raise RunError(
            f"{len(found.failed)} of {len(runs)} runs failed ({failed}): give the same command "
            f"with `folder={folder}` to run them again."
        )
