"""Settings as Hydra's command line spells them."""

import re
from collections.abc import Mapping
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from lightning_peft.errors import ConfigError

_PART = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*|0|[1-9][0-9]*")
"""What may stand between the dots of a name."""

_RESERVED = re.compile(r"([\\()\[\]{}:=, \t])")
"""What has a meaning in a key, unless a backslash stands before it."""


def overrides(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return overrides that give nested settings, one for each value.

    Raises:
        ConfigError: a key inside a value has characters that Hydra knows no spelling for.
    """
    found: list[str] = []
    for name, value in settings.items():
        nested = isinstance(value, Mapping) and value and all(map(_PART.fullmatch, map(str, value)))
        if nested:
            found += overrides(value, f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}={spelled(value)}")
    return found


def spelled(value: Any) -> str:
    """Return a value as Hydra's grammar of overrides reads it back, texts in quotation marks.

    Interpolations stay what they are.

    Raises:
        ConfigError: as `overrides`.
    """
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_key(k)}:{spelled(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(spelled, value)) + "]"
    if isinstance(value, str):
        return QuotedString(value, Quote.single).with_quotes()
    return "null" if value is None else str(value)


def _key(key: Any) -> str:
    text = _RESERVED.sub(r"\\\1", str(key))
    try:
        read = OverridesParser.create().parse_override(f"x={{{text}:0}}").value()
    except HydraException:
        read = None
    if not isinstance(read, dict) or list(map(repr, read)) != [repr(key)]:
        raise ConfigError(
            f"a key of `job.overrides` must be spelled with letters, digits and . / - + _, but is "
            f"{key!r}: give such settings in a file of their own."
        )
    return text
