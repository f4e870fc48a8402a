"""What the keys of the sidecar `lightning_peft.json` must hold, before any of it is used."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_peft.errors import CheckpointError

READABLE = (1, 2)
"""Formats that can be read; in the first the keys of the tensors were always ours."""


def check_sidecar(config: Mapping[str, Any], path: Path) -> None:
    """Refuse a sidecar with a key that is missing, or of another kind than `save` writes.

    Raises:
        CheckpointError: it is; the message names the file and the key.
    """
    if type(config.get("format")) is not int or config["format"] not in READABLE:
        raise CheckpointError(
            f"`{path}` must have `format` {' or '.join(map(str, READABLE))}: update the package."
        )
    if lacking := [key for key in _NEEDED if key not in config]:
        raise CheckpointError(f"`{path}` lacks `{lacking[0]}`: save the adapter again.")
    for key, (fits, kind) in (_NEEDED | _OPTIONAL).items():
        if key in config and not fits(config[key]):
            raise CheckpointError(
                f"`{key}` in `{path}` must be {kind}, but is {config[key]!r:.200} instead: "
                "save the adapter again."
            )


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _name(value: Any) -> bool:
    return _text(value) and re.fullmatch(r"[\w-]*[^\W_][\w-]*", value) is not None


def _methods(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) for m in value)


def _fingerprint(value: Any) -> bool:
    if not isinstance(value, dict) or type(value.get("tensors")) is not int:
        return False
    return _text(value.get("sha256")) and isinstance(value.get("configuration", {}), dict)


_Check = tuple[Callable[[Any], bool], str]
_NEEDED: dict[str, _Check] = {
    "name": (_name, "letters, digits, `_` and `-`"),
    "methods": (_methods, "a list of at least one method's settings"),
    "in_place": (_texts, "a list of names"),
    "fingerprint": (_fingerprint, "a base's fingerprint"),
    "sha256": (_text, "a checksum"),
}
_OPTIONAL: dict[str, _Check] = {
    "adapter_config_sha256": (_text, "a checksum"),
    "base": (lambda value: isinstance(value, dict), "the base's class and name"),
    "keys": (lambda value: value in ("own", "peft"), "own or peft"),
    "lightning_peft": (_text, "a version"),
    "parameters": (lambda value: type(value) is int, "a number"),
    "replaced": (_texts, "a list of names"),
}
