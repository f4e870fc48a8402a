"""`job=list`: what there is to choose from, and what the settings mean."""

import ast
import inspect
import itertools
import json
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_peft.config import TARGET, find_target
from lightning_peft.jobs.conf import Conf, description, in_use, key_of
from lightning_peft.jobs.job import Job
from lightning_peft.report import open_console


@dataclass(frozen=True, kw_only=True)
class List(Job):
    """Show every group with its options; `job=list method=lora` explains LoRA's settings."""

    def run(self, config: DictConfig) -> None:
        conf, console = in_use(), open_console()
        groups = [name for name in conf.groups() if name in _chosen() - {"job", "experiment"}]
        for name in groups:
            settings = OmegaConf.to_container(config[name], resolve=False)
            for where, part in _targets(name, settings):
                _explain(where, part, console)
        if "method" in groups:
            _explain_training(config, console)
        if not groups:
            _overview(conf, console)


def field_docs(cls: Callable[..., Any]) -> dict[str, str]:
    """Return what the settings of a class mean, by name.

    Read are the texts below the fields of a dataclass and of its bases, and the section `Args:`
    of the docstring of any other class or function.
    """
    docs = _args_section(inspect.getdoc(cls) or "")
    if inspect.isclass(cls):
        docs |= _args_section(inspect.getdoc(cls.__init__) or "")
        for base in reversed(inspect.getmro(cls)):
            docs |= _texts_below_fields(base)
    return {name: _first_sentence(text) for name, text in docs.items()}


def _first_sentence(text: str) -> str:
    ends = r"(?<=\.)\s+(?=[A-Z])|(?<=[.:])\s+(?=\.\.|>>>)|\s+Example:|\s+Default:"
    return re.split(ends, text)[0].rstrip(":")


def _texts_below_fields(cls: type) -> dict[str, str]:
    if cls.__module__ == "builtins":
        return {}
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):
        return {}
    tree = ast.parse(source).body[0]
    body = tree.body if isinstance(tree, ast.ClassDef) else []
    docs = {}
    for field, below in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            match below:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    docs[field.target.id] = " ".join(text.split())
    return docs


def _args_section(doc: str) -> dict[str, str]:
    """Read `name: text` from the `Args:` of a docstring, continued lines included."""
    docs: dict[str, str] = {}
    lines = iter(doc.splitlines())
    for line in lines:
        if line.strip() == "Args:":
            break
    name, indent = "", 0
    for line in lines:
        depth = len(line) - len(line.lstrip())
        if line.strip() and depth == 0:
            break
        head, colon, text = line.strip().partition(":")
        indent = indent or depth
        if depth == indent and colon and " " not in head:
            name = head
            docs[name] = text.strip()
        elif name and line.strip():
            docs[name] += f" {line.strip()}"
    return docs


def _chosen() -> set[str]:
    return {key_of(text) for text in HydraConfig.get().overrides.task}


def _overview(conf: Conf, console: Console) -> None:
    for group in conf.groups():
        table = Table(title=group, title_justify="left", title_style="bold", show_header=False)
        table.add_column(no_wrap=True, style="cyan")
        table.add_column()
        for option, file in conf.options(group).items():
            table.add_row(option, Text(description(file)))
        console.print(table)
    console.print("Settings of one option: lightning-peft job=list method=lora", highlight=False)


def _targets(where: str, settings: Any) -> list[tuple[str, dict[str, Any]]]:
    """Return every part below `settings` that names a class, with its own name first."""
    if not isinstance(settings, dict):
        return []
    found = [(where, settings)] if TARGET in settings else []
    for key, value in settings.items():
        found += _targets(f"{where}.{key}", value)
    return found


def _explain(where: str, settings: dict[str, Any], console: Console) -> None:
    cls = find_target(settings[TARGET], f"{where}.{TARGET}")
    docs = field_docs(cls)
    summary = (inspect.getdoc(cls) or cls.__name__).partition("\n\n")[0]
    title = f"{where}: {_first_sentence(' '.join(summary.split()))}"
    _print_settings(title, where, settings, docs, console)


def _explain_training(config: DictConfig, console: Console) -> None:
    """Explain the settings beside a method, which `PEFTModule` takes."""
    from lightning_peft.module import PEFTModule  # slow to import

    docs = field_docs(PEFTModule)
    for where, title in (
        ("optimizer", "optimizer: how it learns"),
        ("adapter", "adapter: what else is trained"),
    ):
        settings: Any = OmegaConf.to_container(config[where], resolve=False)
        _print_settings(title, where, settings, docs, console)


def _print_settings(
    title: str, where: str, settings: dict[str, Any], docs: dict[str, str], console: Console
) -> None:
    table = Table(title=Text(title), title_justify="left", title_style="bold")
    table.add_column("setting", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("meaning")
    for name, value in settings.items():
        if name != TARGET and not _targets("", value):
            table.add_row(f"{where}.{name}", Text(json.dumps(value)), Text(docs.get(name, "")))
    console.print(table)
