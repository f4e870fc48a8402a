"""The formats of other libraries that an adapter can be exported to."""

from collections.abc import Callable
from pathlib import Path

from lightning_peft.adapter import Adapter
from lightning_peft.errors import ConfigError, near_misses
from lightning_peft.files import adapter_folder, adapterhub

FORMATS: dict[str, Callable[[Adapter, str | Path, str | None], Path]] = {
    "adapterhub": adapterhub.export_adapter,
    "peft": adapter_folder.export_adapter,
}
"""What writes an adapter, or its method of a kind, to a folder, by the name of the format."""


def export_adapter(
    adapter: Adapter,
    folder: str | Path,
    format: str,  # noqa: A002
    part: str | None,
) -> Path:
    """Write `adapter`, or its method `part` alone, to `folder` in a format of another library.

    Raises:
        ConfigError: there is no such format.
        AdapterError: the format cannot hold the adapter; the message says why.
    """
    if format not in FORMATS:
        raise ConfigError(
            f"`format` must be one of {', '.join(FORMATS)}, but is {format!r} instead."
            f"{near_misses(format, FORMATS)}"
        )
    return FORMATS[format](adapter, folder, part)
