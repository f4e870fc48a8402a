"""Plain settings to objects and back: the one place where a `_target_` is looked up.

A `_target_` can name anything that Python can import, so it is compared with a list of prefixes
before the import, and what was found is compared again: it must be a class that was *defined*
under an allowed prefix, not merely imported there. Checkpoints and run folders come from strangers
too; both are read through `instantiate`.
"""

import collections.abc
import dataclasses
import importlib
import inspect
import os
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

from lightning_peft.errors import ConfigError, PEFTError, near_misses
from lightning_peft.redact import HIDDEN

_Kind = TypeVar("_Kind")

TARGET = "_target_"
MISSING = "???"
"""A setting that has no value yet, as OmegaConf spells it."""

ALLOWED = (
    "lightning_peft.",
    "lightning.pytorch.Trainer",
    "lightning.pytorch.trainer.trainer.Trainer",
    "lightning.pytorch.accelerators.",
    "lightning.pytorch.callbacks.",
    "lightning.pytorch.loggers.",
    "lightning.pytorch.plugins.",
    "lightning.pytorch.profilers.",
    "lightning.pytorch.strategies.",
    "torch.optim.",
    "torchmetrics.classification.",
    "torchmetrics.regression.",
)
"""What a `_target_` may name: a prefix when it ends in a dot, else one class."""

ALLOWED_FUNCTIONS = (
    "lightning_peft.callbacks.progress.progress_bar",
    "lightning_peft.loggers.wandb_logger",
)
"""The functions that may stand in place of a class, by the module that defines them."""

_NUMBERS: dict[type, tuple[type, ...]] = {
    bool: (bool, object),
    int: (int, float, object),
    float: (float, object),
}
"""What a number may be given for: 3 where 3.0 is expected, but neither True for 1 nor 3.0 for 3."""

Unbuilt = typing.Annotated[Mapping[str, Any], "unbuilt"]
"""The type of a setting whose parts stay plain descriptions, for its owner to build when needed."""

_user_packages: set[str] = set()


def allow_packages(*names: str) -> None:
    """Let `_target_` name classes of the user's own packages, for the rest of this process.

    Only a person may decide this: call it from code or with `allow=[my_package]` on the command
    line, never with names read from a run folder or a checkpoint.

    Raises:
        ConfigError: a name is not that of a package.
    """
    for name in names:
        if not all(part.isidentifier() for part in str(name).split(".")):
            raise ConfigError(f"`allow` must list packages, but holds {name!r} instead.")
    _user_packages.update(names)


def instantiate_as(kind: type[_Kind], spec: Any, where: str = "") -> _Kind:
    """Build an object of `kind`, or of a class derived from it, and nothing else.

    What comes from a file of others is built by this: another allowed class is refused before its
    constructor runs. Inside, only dataclasses are built: settings, which do nothing when made.

    Raises:
        ConfigError: As `instantiate`, and where `spec` describes something else.
    """
    target = spec.get(TARGET) if isinstance(spec, Mapping) else None
    found = find_target(target, _join(where, TARGET)) if target is not None else None
    if not (inspect.isclass(found) and issubclass(found, kind)):
        raise ConfigError(f"`{where or TARGET}` must be a {kind.__name__}, but is {spec} instead.")
    for key, part in spec.items():
        if key not in _unbuilt(spec, where):
            _require_settings(part, _join(where, key))
    return cast(_Kind, instantiate(spec, where))


def _require_settings(spec: Any, where: str) -> None:
    """Refuse a `_target_` anywhere in `spec` that is more than a dataclass."""
    if isinstance(spec, Mapping):
        if TARGET in spec and not dataclasses.is_dataclass(find_target(spec[TARGET], where)):
            raise ConfigError(f"`{where}` must be settings, but is {spec[TARGET]!r} instead.")
        for key, part in spec.items():
            _require_settings(part, _join(where, key))
    elif isinstance(spec, (list, tuple)):
        for i, part in enumerate(spec):
            _require_settings(part, f"{where}[{i}]")


def instantiate(spec: Any, where: str = "") -> Any:
    """Build what `spec` describes, nested lists and dictionaries included.

    Args:
        spec: Plain containers; a dictionary with a `_target_` becomes an object of that class.
        where: Name of this part of the config, put before a setting's name in errors.

    Raises:
        ConfigError: The target is not allowed or not a class, a setting is unknown, missing or of
            a wrong type, or the class refuses its settings.
    """
    if isinstance(spec, Mapping):
        kept = _unbuilt(spec, where)
        parts = {
            key: value if key in kept else instantiate(value, _join(where, key))
            for key, value in spec.items()
        }
        return _build(parts, where) if TARGET in spec else parts
    if isinstance(spec, (list, tuple)):
        return [instantiate(value, f"{where}[{i}]") for i, value in enumerate(spec)]
    if isinstance(spec, str) and spec in (MISSING, HIDDEN):
        reason = "has no value" if spec == MISSING else "was not saved, since it is a secret"
        raise ConfigError(f"`{where}` {reason}: give it as `{where}=...`.")
    return spec


def to_spec(obj: Any) -> dict[str, Any]:
    """Describe a settings object in plain containers; `instantiate` gives back its equal.

    Args:
        obj: A dataclass, or an object with a method `to_spec()` that returns such a description.

    Raises:
        ConfigError: `obj`, or one of its settings, cannot be described.
    """
    own = getattr(obj, "to_spec", None)
    if callable(own):
        return cast(dict[str, Any], own())
    if not dataclasses.is_dataclass(obj) or isinstance(obj, type):
        raise ConfigError(
            f"`{type(obj).__name__}` must be a dataclass or have a method `to_spec()` to be "
            f"stored, but is neither."
        )
    fields = (field.name for field in dataclasses.fields(obj) if field.init)
    return {TARGET: target_of(type(obj))} | {n: _plain(getattr(obj, n), n) for n in fields}


def target_of(cls: type) -> str:
    """Return the `_target_` of a class: the package that exports it, else where it is defined."""
    package = cls.__module__.rpartition(".")[0]
    if package and getattr(sys.modules.get(package), cls.__name__, None) is cls:
        return f"{package}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def find_target(target: Any, where: str = TARGET) -> Callable[..., Any]:
    """Import the class, or one of the few allowed functions, that `target` names.

    Raises:
        ConfigError: `target` is not under an allowed prefix (it is then not imported), does not
            exist, is something else than a class, or is defined elsewhere.
    """
    if not isinstance(target, str) or not _is_allowed(target):
        raise ConfigError(_refusal(target, where))
    module_name, _, name = target.rpartition(".")
    module = _import(module_name, target, where)
    found = getattr(module, name, None)
    if found is None:
        classes = [name for name, value in vars(module).items() if inspect.isclass(value)]
        raise ConfigError(
            f"`{where}` must name a class of `{module_name}`, but is {target!r} instead."
            f"{near_misses(name, classes)}"
        )
    defined = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
    if not ((inspect.isclass(found) and _is_allowed(defined)) or defined in ALLOWED_FUNCTIONS):
        raise ConfigError(_refusal(target, where))
    return cast(Callable[..., Any], found)


def find_function(target: Any, where: str) -> Callable[..., Any]:
    """Import the function of a package of the user's own that `target` names.

    Raises:
        ConfigError: its package is not allowed (it is then not imported), it does not exist, is no
            function, or is defined elsewhere.
    """
    if not isinstance(target, str) or not _is_own(target):
        raise ConfigError(
            f"`{where}` must be a function in a package of your own that is allowed, but is "
            f"{target!r} instead: give it as my_package.my_function, and allow the package by "
            f"`allow=[my_package]` on the command line, or by "
            f"`lightning_peft.config.allow_packages('my_package')`."
        )
    module_name, _, name = target.rpartition(".")
    module = _import(module_name, target, where)
    found = getattr(module, name, None)
    if not inspect.isfunction(found):
        known = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        raise ConfigError(
            f"`{where}` must name a function of `{module_name}`, but is {target!r} instead."
            f"{near_misses(name, known)}"
        )
    if not _is_own(f"{found.__module__}.{found.__qualname__}"):
        raise ConfigError(
            f"`{where}` must be defined in a package that is allowed, but {target!r} comes from "
            f"`{found.__module__}`."
        )
    return found


def _import(module: str, target: str, where: str) -> types.ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise ConfigError(
            f"`{where}` must name what can be imported, but {target!r} does not exist."
        ) from error


def _unbuilt(spec: Mapping[Any, Any], where: str) -> set[str]:
    """Return the settings of what `spec` describes whose parts are not to be built."""
    if TARGET not in spec:
        return set()
    target = find_target(spec[TARGET], _join(where, TARGET))
    return {name for name, (hint, _) in _parameters(target).items() if Unbuilt in _options(hint)}


def check_settings(
    target: Callable[..., Any], settings: Mapping[str, Any], where: str = ""
) -> dict[str, Any]:
    """Compare settings with the arguments of a class or function, by name and type.

    Returns:
        The settings, with lists made tuples where the argument is a sequence.

    Raises:
        ConfigError: A setting is unknown or of a wrong type.
    """
    known = _parameters(target)
    named = [name for name in known if name != "**"]
    for name in settings:
        if name not in known and "**" not in known:
            raise ConfigError(
                f"`{_join(where, str(name))}` must be a setting of {target.__name__} "
                f"({', '.join(named)}), but is not.{near_misses(str(name), named)}"
            )
    return {
        name: _fit(value, known[name][0] if name in known else Any, _join(where, str(name)))
        for name, value in settings.items()
    }


def _build(settings: dict[str, Any], where: str) -> Any:
    target = find_target(settings.pop(TARGET), _join(where, TARGET))
    checked = check_settings(target, settings, where)
    for name, (_, required) in _parameters(target).items():
        if required and name not in settings:
            raise ConfigError(f"`{_join(where, name)}` must be given for {target.__name__}.")
    try:
        return target(**checked)
    except PEFTError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"`{where or target.__name__}` cannot be built: {error}") from error


def _parameters(cls: Callable[..., Any]) -> dict[str, tuple[Any, bool]]:
    """Map each setting of `cls` to its type and whether it must be given; `**` means any other."""
    known: dict[str, tuple[Any, bool]] = {}
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            known["**"] = (Any, False)
        elif parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
            required = parameter.default is inspect.Parameter.empty
            known[parameter.name] = (_evaluate(parameter.annotation, cls), required)
    return known


def _evaluate(annotation: Any, cls: Callable[..., Any]) -> Any:
    if annotation is inspect.Parameter.empty:
        return Any
    if not isinstance(annotation, str):
        return annotation
    try:  # the text is the class's own source, not the user's
        return typing.get_type_hints(
            types.SimpleNamespace(__annotations__={"x": annotation}),
            vars(sys.modules[cls.__module__]),
        )["x"]
    except (NameError, TypeError, AttributeError):
        return Any  # a name imported for type checkers only


def _fit(value: Any, hint: Any, where: str) -> Any:
    """Return `value`, as a tuple where `hint` is a sequence, or raise a ConfigError."""
    for option in _options(hint):
        if isinstance(value, Mapping) and typing.get_args(option)[:1] == (int,):
            value = _with_integer_keys(value)
        if _matches(value, option):
            wants_tuple = typing.get_origin(option) in (tuple, collections.abc.Sequence)
            return tuple(value) if wants_tuple and isinstance(value, list) else value
    choices = [
        c for o in _options(hint) if _origin(o) is typing.Literal for c in typing.get_args(o)
    ]
    close = near_misses(str(value), [str(choice) for choice in choices])
    wanted = " or ".join(_name(option) for option in _options(hint))
    raise ConfigError(f"`{where}` must be {wanted}, but is {value!r} instead.{close}")


def _with_integer_keys(value: Mapping[Any, Any]) -> dict[Any, Any]:
    # JSON has no keys but strings.
    return {int(k) if isinstance(k, str) and k.isdecimal() else k: v for k, v in value.items()}


def _options(hint: Any) -> Iterator[Any]:
    """Yield the members of a union, nested ones too, or `hint` itself."""
    if _origin(hint) in (typing.Union, types.UnionType):
        for member in typing.get_args(hint):
            yield from _options(member)
    else:
        yield hint


def _matches(value: Any, hint: Any) -> bool:
    """Tell whether `value`, as YAML gives it, is what a type hint other than a union allows."""
    hint = _unmarked(hint)
    kind, inner = _origin(hint), typing.get_args(hint)
    if hint is Any or value is None:
        return hint in (Any, None, type(None), object)
    if kind is typing.Literal:
        return any(value == choice and type(value) is type(choice) for choice in inner)
    if not inspect.isclass(kind):
        return True  # a type variable or a callable: nothing to compare with
    if isinstance(value, (bool, int, float)):
        return kind in _NUMBERS[type(value)]
    if isinstance(value, str):
        return kind in (str, object) or issubclass(kind, os.PathLike)
    if isinstance(value, Mapping):
        keys, values = inner if len(inner) == 2 else (Any, Any)
        items = value.items()
        return issubclass(dict, kind) and all(_fits(k, keys) and _fits(v, values) for k, v in items)
    if isinstance(value, (list, tuple)):
        return (kind is tuple or issubclass(list, kind)) and _items_match(value, kind, inner)
    return isinstance(value, kind)


def _items_match(value: list[Any] | tuple[Any, ...], kind: type, inner: tuple[Any, ...]) -> bool:
    if kind is tuple and inner and inner[-1] is not Ellipsis:
        return len(inner) == len(value) and all(map(_fits, value, inner))
    return not inner or all(_fits(item, inner[0]) for item in value)


def _fits(value: Any, hint: Any) -> bool:
    return any(_matches(value, option) for option in _options(hint))


def _origin(hint: Any) -> Any:
    return typing.get_origin(hint) or hint


def _unmarked(hint: Any) -> Any:
    """Return the type itself of one that is `Annotated`."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint


def _name(hint: Any) -> str:
    hint = _unmarked(hint)
    if hint is type(None):
        return "null"
    if _origin(hint) is typing.Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(hint))
    if typing.get_args(hint):
        return str(hint).replace("collections.abc.", "").replace("typing.", "")
    return getattr(hint, "__name__", str(hint))


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if dataclasses.is_dataclass(value) or hasattr(value, "to_spec"):
        return to_spec(value)
    raise ConfigError(
        f"`{where}` must be a number, a text, a list or a dictionary to be stored, but is "
        f"{value!r} instead."
    )


def _is_allowed(target: str) -> bool:
    if not all(part.isidentifier() for part in target.split(".")):
        return False
    return _is_own(target) or any(
        target.startswith(entry) if entry.endswith(".") else target == entry for entry in ALLOWED
    )


def _is_own(target: str) -> bool:
    """Whether `target` lies in a package that the user has allowed."""
    named = all(part.isidentifier() for part in target.split("."))
    return named and any(target.startswith(f"{package}.") for package in _user_packages)


def _refusal(target: Any, where: str) -> str:
    return (
        f"`{where}` must be a class of lightning_peft, or of those parts of lightning, torch.optim "
        f"and torchmetrics that are allowed, but is {target!r} instead. A package of your own is "
        f"allowed by `allow=[my_package]` on the command line."
    )


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else str(name)
