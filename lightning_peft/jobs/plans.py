"""What the runs of a comparison are made with: the same for all, but for the method."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_peft.errors import ConfigError
from lightning_peft.jobs import saved
from lightning_peft.jobs.conf import key_of
from lightning_peft.jobs.overrides import overrides
from lightning_peft.jobs.run_folder import resolved
from lightning_peft.redact import redact

_OWN = ("job", "folder", "seed", "title")
"""Settings of the comparison itself; its runs get values of their own for them."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One run that a comparison makes."""

    name: str
    """The contender's: its methods, or `baseline`."""
    seed: int
    arguments: Sequence[str]
    """Overrides by which `lightning-peft` makes the run, but for its folder."""
    settings: Mapping[str, Any]
    """What they compose to."""

    def folder(self, comparison: Path) -> Path:
        """Return where the run goes."""
        return comparison / self.name / f"seed-{self.seed}"

    def check_same(self, run: Path) -> None:
        """Compare with the settings of a run that was made before, if it was.

        Raises:
            ConfigError: One of them differs.
        """
        if not (run / saved.CONFIG).is_file():
            return
        kept, wanted = saved.read(run), yaml.safe_load(yaml.safe_dump(redact(self.settings)))
        kept, wanted = _leaves(kept), _leaves(wanted)
        for key in sorted(wanted):
            own = key.partition(".")[0] in ("run", "folder", "job", "title")
            if not own and kept.get(key) != wanted[key]:
                raise ConfigError(
                    f"`folder` holds a run of {self.name} with another `{key}`: {kept.get(key)!r} "
                    f"instead of {wanted[key]!r}. Give the settings that it was made with, or "
                    f"another `folder`."
                )


def name_of(methods: str | Sequence[str]) -> str:
    """Return the name of a contender."""
    return methods if isinstance(methods, str) else "-".join(methods)


def plan(
    config: DictConfig, methods: str | Sequence[str] | None, seed: int, more: Mapping[str, Any]
) -> Plan:
    """Compose the settings of a run, which shows what is wrong with them before any run.

    A recipe's learning rate is for the recipe's own method: the other contenders get that of their
    own file. What the command line says is for all that have it; `more` for this one alone.

    Args:
        config: Of the comparison.
        methods: Options of `method`; None measures the base without one.
        seed: Of the training; the held-out rows are the same with any.
        more: Further settings by name.

    Raises:
        ConfigError: They do not go together.
    """
    names = [methods] if isinstance(methods, str) else list(methods or ())
    name = name_of(names) if names else "baseline"
    arguments = ["job=baseline"]
    if names:
        option = f"[{','.join(names)}]" if len(names) > 1 else names[0]
        arguments = ["job=fit", "job.baseline=false", f"method={option}"]
    try:
        plain = compose("train", arguments)
        if names and names != [HydraConfig.get().runtime.choices.get("method")]:
            arguments += overrides({"optimizer": OmegaConf.to_container(plain.optimizer)})
        arguments += [*_for_all(list(plain.method)), *overrides(more), f"seed={seed}"]
        if "seed" in config.data and "data.seed" not in map(key_of, arguments):
            arguments.append(f"data.seed={config.data.seed}")
        arguments += _deletions(compose("train", arguments), plain)
        settings = resolved(compose("train", arguments))
    except (HydraException, OmegaConfBaseException) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"the contender `{name}` cannot be composed: {first}") from error
    return Plan(name=name, seed=seed, arguments=arguments, settings=settings)


def _for_all(keys: Sequence[str]) -> list[str]:
    """Return the command line's overrides for runs whose methods stand under these keys."""
    kept = []
    for text in HydraConfig.get().overrides.task:
        group, _, rest = key_of(text).partition(".")
        others = group == "method" and rest.partition(".")[0] not in keys
        if group not in _OWN and not others:
            kept.append(text)
    return kept


def _deletions(found: DictConfig, plain: DictConfig) -> list[str]:
    """Return overrides that take out what a recipe says of another job or method."""
    groups = ("job", "method")
    return [f"~{g}.{name}" for g in groups for name in found[g] if name not in plain[g]]


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their whole names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        nested = isinstance(value, Mapping) and value
        found |= _leaves(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return found
