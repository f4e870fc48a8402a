"""Which modules a method changes: by structure, by pattern, by layer index."""

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_peft.delta import SLOT
from lightning_peft.errors import ConfigError, TargetError, near_misses
from lightning_peft.structure import anatomy

ALL_LINEAR = "all-linear"

Patterns = str | Sequence[str]
Fits = Callable[[nn.Module], bool]


@dataclass(frozen=True)
class Targets:
    """A choice of modules.

    A pattern is a glob on the dotted name or on its end (`q_proj`, `layers.0.*.query`), a regular
    expression on the whole name when it starts with `re:`, or `all-linear`: every linear layer but
    the head and the projection onto the vocabulary.
    """

    include: Patterns | None = None
    """Patterns, each of which must match; None lets the model's structure decide."""

    exclude: Patterns = ()
    """Patterns of modules to leave out, each of which must match."""

    layers: Sequence[int] | None = None
    """Indices into the model's layer stack (negative ones count from its end); None takes all."""

    def find(self, model: nn.Module, fits: Fits, what: str) -> dict[str, nn.Module]:
        """Return the chosen modules by name, in the model's order.

        Args:
            model: where to look.
            fits: whether the method can change a module.
            what: the modules that it can change, in words, for the error.

        Raises:
            TargetError: a pattern matches nothing, or only modules that the method cannot change.
        """
        chosen = self._included(model, fits, what)
        if self.exclude or self.layers is not None:
            chosen = self._narrowed(model, chosen)
        if not chosen:
            name = type(model).__name__
            if self == Targets():
                raise TargetError(f"{name} has nothing that this method changes: {what}.")
            raise TargetError(
                f"{self} leaves no module of {name} to change; this method changes {what}."
            )
        return chosen

    def _included(self, model: nn.Module, fits: Fits, what: str) -> dict[str, nn.Module]:
        if self.include is None:
            return {n: m for n, m in anatomy.projections(model) if fits(m)}
        modules, found = dict(anatomy.base_modules(model)), set()
        for pattern in as_patterns(self.include):
            hits = all_linear(model) if pattern == ALL_LINEAR else _must_match(pattern, modules)
            found |= (fitting := {name for name in hits if fits(modules[name])})
            if not fitting:
                raise TargetError(_misfit(pattern, hits, modules, what))
        return {name: module for name, module in modules.items() if name in found}

    def _narrowed(self, model: nn.Module, chosen: dict[str, nn.Module]) -> dict[str, nn.Module]:
        out = {name for p in as_patterns(self.exclude) for name in _must_match(p, chosen)}
        roots = ("",) if self.layers is None else layer_roots(model, self.layers)
        return {n: m for n, m in chosen.items() if n not in out and n.startswith(roots)}


def as_targets(targets: "Targets | Patterns | None", layers: Sequence[int] | None) -> Targets:
    """Return a method's two settings, `targets` and `layers`, as one choice.

    Raises:
        ConfigError: both name layers.
    """
    if not isinstance(targets, Targets):
        return Targets(targets, layers=layers)
    if layers is not None:
        raise ConfigError(
            f"`layers` must be part of `targets`, which is a Targets, but is {layers} instead: "
            "write `Targets(..., layers=...)`."
        )
    return targets


def as_patterns(patterns: Patterns) -> tuple[str, ...]:
    """Return one pattern or several as a tuple."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def matches(pattern: str, name: str) -> bool:
    """Whether a glob or `re:` pattern fits a dotted name."""
    if pattern.startswith("re:"):
        return _expression(pattern).fullmatch(name) is not None
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def exactly(names: Iterable[str]) -> tuple[str, ...]:
    """Return patterns that name these and, unlike the bare names, none that ends so."""
    return tuple(f"re:{re.escape(name)}" for name in names)


def all_linear(model: nn.Module) -> list[str]:
    """Return the names of all linear layers but the head's and the vocabulary's."""
    heads = tuple(name for name, _ in anatomy.head(model))
    words = anatomy.vocabulary(model)
    return [
        name
        for name, module in anatomy.base_modules(model)
        if (anatomy.is_linear(module) or anatomy.read_weights(module))
        and not anatomy.under(name, heads)
        and not anatomy.speaks(module, words)
    ]


def trained_in_place(model: nn.Module, patterns: Patterns) -> list[str]:
    """Return the parameters that `patterns` of parameters or modules name.

    Raises:
        TargetError: a pattern names no parameter.
    """
    first = {id(p): n for n, p in model.named_parameters() if f".{SLOT}." not in f".{n}"}
    every = model.named_parameters(remove_duplicate=False)
    names = {name: first[id(p)] for name, p in every if id(p) in first}
    modules = dict(anatomy.base_modules(model))
    chosen: set[str] = set()
    for pattern in as_patterns(patterns):
        roots = tuple(f"{name}." for name in modules if name and matches(pattern, name))
        hits = [names[n] for n in names if matches(pattern, n) or n.startswith(roots)]
        if not hits:
            raise TargetError(_nothing(f"train={pattern!r}", pattern, [*modules, *names]))
        chosen.update(hits)
    return [name for name in first.values() if name in chosen]


def _must_match(pattern: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    hits = [name for name in names if name and matches(pattern, name)]
    if not hits:
        raise TargetError(_nothing(f"`{pattern}`", pattern, names))
    return hits


def _expression(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise TargetError(f"`{pattern}` is no regular expression: {error}.") from error


def _nothing(setting: str, pattern: str, names: Iterable[str]) -> str:
    ends = {".".join(name.split(".")[-2:]) for name in names} | {
        name.rpartition(".")[2] for name in names
    }
    words = sorted(end for end in ends if end and not end.isdigit())
    close = near_misses(pattern, words) or f" Its modules end in {', '.join(words[:12])}."
    return f"{setting} matches no module of the model.{close}"


def _misfit(pattern: str, hits: list[str], modules: dict[str, nn.Module], what: str) -> str:
    if not hits:
        return f"`{pattern}` matches no module of the model."
    if anatomy.is_uncalled(modules[hits[0]]):
        return (
            f"`{hits[0]}` is read by MultiheadAttention as a tensor and never called, so nothing "
            "attached to it would act: name other targets."
        )
    kinds = sorted({type(modules[name]).__name__ for name in hits})
    return (
        f"`{pattern}` matches `{hits[0]}` ({', '.join(kinds)}), but this method changes {what}: "
        f"name the layers inside, for example `{pattern}.*`."
    )


def layer_roots(model: nn.Module, indices: Sequence[int]) -> tuple[str, ...]:
    """Return what the names in the chosen layers start with.

    Raises:
        TargetError: there is no such layer.
    """
    stack = [f"{name}." for name, _ in anatomy.layers(model)]
    if not stack:
        raise TargetError(
            f"`layers` must be None, since {type(model).__name__} has no layer stack, but is "
            f"{list(indices)} instead."
        )
    count = len(stack)
    if wrong := [i for i in indices if not -count <= i < count]:
        raise TargetError(f"`layers` must lie in [-{count}, {count}), but {wrong[0]} does not.")
    return tuple(stack[i] for i in indices)
