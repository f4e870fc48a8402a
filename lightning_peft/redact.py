"""Take secrets out of a configuration before it is printed, saved or sent to a tracker."""

import os
import re
from collections.abc import Mapping, Sequence, Set
from typing import Any

HIDDEN = "<redacted>"

_SECRET_NAME = re.compile(
    r"(?:^|[^a-z])(?:token|key|auth)(?:$|[^a-z])|apikey|secret|passw|passphrase|credential"
)
_SECRET_VALUE = re.compile(
    r"hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|AKIA[0-9A-Z]{16}"
    r"|wandb_v\d_[A-Za-z0-9_]{16,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
_SHORTEST_SECRET = 8


def redact(config: Any) -> Any:
    """Return `config` as plain dicts, lists and scalars, with every secret hidden.

    Hidden are strings below a name like ``token``, ``api_key``, ``secret`` or ``password``, strings
    that look like an access token or a URL's password, and whatever an environment variable with
    such a name holds. Numbers stay, so that ``tokens=20`` or ``max_tokens=128`` can be read.
    """
    return _redact(config, hide=False, known=_environment_secrets())


def redact_arguments(arguments: Sequence[str]) -> list[str]:
    """Return command-line `arguments`, with the value hidden in each ``some.api_key=value``."""
    return [_redact_argument(argument) for argument in arguments]


def _redact_argument(argument: str) -> str:
    name, equals, value = argument.partition("=")
    if not equals:
        return str(redact(argument))
    return f"{name}={redact({name.rpartition('.')[2]: value}).popitem()[1]}"


def _redact(value: Any, hide: bool, known: frozenset[str]) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _redact(v, hide or _is_secret(str(k)), known) for k, v in value.items()}
    if isinstance(value, Sequence | Set) and not isinstance(value, str | bytes):
        return [_redact(item, hide, known) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return HIDDEN if hide and str(value) else _hide_inside(str(value), known)


def _hide_inside(text: str, known: frozenset[str]) -> str:
    for secret in known:
        text = text.replace(secret, HIDDEN)
    return _SECRET_VALUE.sub(HIDDEN, text)


def _is_secret(name: str) -> bool:
    # `accessKey` and `access-key` are read as `access_key`.
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    return _SECRET_NAME.search(words) is not None


def _environment_secrets() -> frozenset[str]:
    return frozenset(
        value
        for name, value in os.environ.items()
        if _is_secret(name) and len(value) >= _SHORTEST_SECRET
    )
