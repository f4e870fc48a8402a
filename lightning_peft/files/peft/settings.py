"""A configuration of peft's being read: nothing in it is passed over in silence.

A spelling takes the settings that it knows. What remains is fine where it is off (older and newer
versions of peft write many features that are not used), or where it is known not to matter; else it
is refused by name, since it may change what the adapter computes.
"""

import math
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from lightning_peft.errors import CheckpointError

_Value = TypeVar("_Value")

HARMLESS = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "inference_mode", "init_weights", "library_name",
        "megatron_core", "modules_to_save", "peft_type", "peft_version", "revision",
        "runtime_config", "task_type",
    }
)  # fmt: skip
"""Settings that say where a file comes from, or how a fresh adapter starts, or are read apart."""


class Settings:
    """The settings of one `adapter_config.json`.

    Args:
        values: by name.
        where: the file, for errors.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = dict(values), where
        self._known = set(HARMLESS)

    def peek(self, name: str) -> Any:
        """Return a value that is read apart, or None."""
        return self.values.get(name)

    def take(self, name: str, default: _Value) -> _Value:
        """Return a value of the default's kind; where there is none, the default.

        Raises:
            CheckpointError: it is of another kind, or not finite.
        """
        self._known.add(name)
        value = self.values.get(name)
        if value is None:
            return default
        kinds: tuple[type, ...] = (int, float) if isinstance(default, float) else (type(default),)
        if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool):
            raise self.refusal(name, f"must be of type {type(default).__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise self.refusal(name, "must be finite")
        return cast(_Value, value)

    def any_of(self, name: str, *kinds: type) -> Any:
        """Return a value that is None or of one of `kinds`.

        Raises:
            CheckpointError: it is of another kind.
        """
        self._known.add(name)
        value = self.values.get(name)
        if value is not None and not isinstance(value, kinds):
            known = " or ".join(kind.__name__ for kind in kinds)
            raise self.refusal(name, f"must be of type {known}")
        return value

    def ignore(self, *names: str) -> None:
        """Declare settings harmless: they change no output, given the others."""
        self._known.update(names)

    def lose(self, *names: str) -> None:
        """Declare settings that only act in training and that we lack; one that is on is told of.

        The adapter computes what it did; trained on it would be without them.
        """
        self.ignore(*names)
        for name in names:
            if self.values.get(name):
                warnings.warn(
                    f"`{name}` = {self.values[name]} in `{self.where}` is not supported and will "
                    "not act if the adapter is trained on.",
                    stacklevel=2,
                )

    def finish(self) -> None:
        """Refuse what nobody took and what is not off.

        Raises:
            CheckpointError: there is such a setting.
        """
        for name, value in self.values.items():
            if name not in self._known and value not in (None, False, {}, [], "", 0):
                raise self.refusal(
                    name, "is not supported, and what it changes would be lost: it must be off"
                )

    def refusal(self, name: str, reason: str) -> CheckpointError:
        """Return the error that names a setting and its value."""
        return CheckpointError(
            f"`{name}` in `{self.where}` {reason}, but is {self.values.get(name)!r} instead."
        )
