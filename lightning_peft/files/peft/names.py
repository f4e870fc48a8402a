"""Which modules peft's patterns mean, and the shortest patterns that mean a set of modules.

In peft a list names modules by their dotted name or its end, a text is a regular expression for
the whole name. Patterns of ours (`structure/targets.py`) mean the same by the same ends.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import nn

from lightning_peft.delta import plain_name
from lightning_peft.errors import CheckpointError, TargetError, near_misses
from lightning_peft.files.peft.settings import Settings
from lightning_peft.structure.anatomy import base_modules, is_linear
from lightning_peft.structure.targets import ALL_LINEAR

_Value = TypeVar("_Value")

_HEADS = ("classifier", "score")


def shortest(names: Iterable[str], chosen: Collection[str]) -> list[str] | str:
    """Return the shortest ends that name exactly `chosen` among `names`, in peft and in ours.

    Where no end does, as for `head` beside `aux.head`, a regular expression for the whole names.
    """
    chosen = set(chosen)
    every = Counter(end for name in names for end in _ends(name))
    own = Counter(end for name in chosen for end in _ends(name))
    found = {next((e for e in _ends(n) if own[e] == every[e]), None) for n in chosen}
    if None in found:
        return "|".join(re.escape(name) for name in sorted(chosen))
    return sorted(end for end in found if end is not None)


def as_targets(model: nn.Module, chosen: Collection[str]) -> tuple[str, ...]:
    """Return patterns of ours that name exactly these modules."""
    found = shortest(module_names(model), chosen)
    return (f"re:{found}",) if isinstance(found, str) else tuple(found)


def module_names(model: nn.Module) -> list[str]:
    """Return the names of the model's own modules."""
    return [plain_name(name) for name, _ in base_modules(model) if name]


def deviating(values: Mapping[str, _Value], default: _Value) -> dict[str, _Value]:
    """Return the shortest ends of names with the values that are not the default."""
    groups = {value: [n for n, v in values.items() if v == value] for value in values.values()}
    patterns: dict[str, _Value] = {}
    for value, names in groups.items():
        if value != default:
            ends = shortest(values, names)
            patterns |= dict.fromkeys([ends] if isinstance(ends, str) else ends, value)
    if all(matching(patterns, name, default) == value for name, value in values.items()):
        return patterns
    return {re.escape(name): value for name, value in values.items() if value != default}


def matching(patterns: Mapping[str, _Value], name: str, default: _Value) -> _Value:
    """Return the value of peft's first pattern that fits (`rank_pattern`), or the default."""
    fits = (v for p, v in patterns.items() if _expression(rf"(.*\.)?({p})").fullmatch(name))
    return next(fits, default)


def target_hosts(settings: Settings, model: nn.Module) -> list[str]:
    """Return the modules that a configuration targets, in the model's order.

    Raises:
        CheckpointError: it targets none, or a pattern of a list matches nothing.
    """
    targets = settings.any_of("target_modules", list, str)
    excluded = settings.any_of("exclude_modules", list, str) or []
    indices, within = _layers(settings)
    saved = settings.any_of("modules_to_save", list) or []
    if targets is None:
        raise settings.refusal("target_modules", "must name the modules, as peft writes it")
    names = module_names(model)
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        targets = _all_linear(model, settings.peek("task_type"))
    hosts = [n for n in names if meant(targets, n) and not meant(excluded, n)]
    hosts = [n for n in hosts if not any(_within(str(m), n) for m in saved)]
    if indices is not None and isinstance(targets, list):
        hosts = [n for n in hosts if _layer_of(n, within) in indices]
    if not hosts and targets:
        _refuse_nothing(settings, targets, names)
    return hosts


def _layers(settings: Settings) -> tuple[set[int] | None, list[str]]:
    indices = settings.any_of("layers_to_transform", list, int)
    within = settings.any_of("layers_pattern", list, str) or []
    if isinstance(indices, int):
        indices = [indices]
    return set(indices) if indices else None, [within] if isinstance(within, str) else within


def meant(patterns: Any, name: str, loose: bool = False) -> bool:
    """Whether a text or a list of peft's means a name; a `loose` list, whatever ends so."""
    if isinstance(patterns, str):
        return _expression(patterns).fullmatch(name) is not None
    dot = "" if loose else "."
    return any(name == p or name.endswith(f"{dot}{p}") for p in patterns)


def _within(module: str, name: str) -> bool:
    return _expression(rf"(^|.*\.){module}($|\..*)").match(name) is not None


def _layer_of(name: str, within: list[str]) -> int | None:
    index = r"\.(?P<index>\d+)\."
    expressions = [rf"(?:^|.*?\.){p}{index}" for p in within] or [rf".*?\.[^.]*{index}"]
    hits = (_expression(e).match(name) for e in expressions)
    return next((int(hit["index"]) for hit in hits if hit), None)


def _expression(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise TargetError(f"`{pattern}` is no regular expression: {error}.") from error


def _all_linear(model: Any, task: Any) -> list[str]:
    """Return what peft takes "all-linear" for."""
    spoken = getattr(model, "get_output_embeddings", lambda: None)()
    heads = _HEADS if spoken is None and task == "SEQ_CLS" else ()
    first = next((h for h in heads if getattr(model, h, None) is not None), None)
    return [n for n, m in base_modules(model) if is_linear(m) and m is not spoken and n != first]


def _refuse_nothing(settings: Settings, targets: Any, names: list[str]) -> None:
    wanted = targets if isinstance(targets, str) else str(targets[0])
    close = near_misses(wanted, {name.rpartition(".")[2] for name in names})
    raise CheckpointError(
        f"`target_modules` in `{settings.where}` names no module of the model: {targets!r}.{close}"
    )


def _ends(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[i:]) for i in reversed(range(len(parts))))
