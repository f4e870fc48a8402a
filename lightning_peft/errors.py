"""Errors a user can mend, and the late import of optional packages.

Every error of the library that stems from a user's input is a `PEFTError`: the command line
prints its one sentence without a stack trace.
"""

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class PEFTError(Exception):
    """Something the user can mend; the message names the value and the remedy."""


class ConfigError(PEFTError, ValueError):
    """A setting has a wrong value, or names something that does not exist."""


class TargetError(PEFTError, ValueError):
    """A pattern matches no module, or one that a method cannot change."""


class AdapterError(PEFTError, RuntimeError):
    """An adapter does not fit the model, or is used in a state that forbids it."""


class CheckpointError(PEFTError, RuntimeError):
    """A checkpoint or adapter folder is missing, damaged, or belongs to another base."""


class DataError(PEFTError, ValueError):
    """A data file, a column or a label is not what the task needs."""


class NonFiniteError(PEFTError, ArithmeticError):
    """The loss or a gradient became NaN or infinite."""


class RunError(PEFTError, RuntimeError):
    """A run that was started in a process of its own did not end well."""


class MissingExtraError(PEFTError, ImportError):
    """An optional package is not installed."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional `module`, or say which `extra` of this package brings it.

    Raises:
        MissingExtraError: `module` is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"`{module}` is needed here but is not installed: "
            f"run `pip install 'lightning-peft[{extra}]'`."
        ) from error


def near_misses(name: str, choices: Iterable[str], n: int = 3) -> str:
    """Return ` Did you mean …?` with up to `n` of the `choices` closest to `name`, or ``""``."""
    close = difflib.get_close_matches(name, list(choices), n=n, cutoff=0.5)
    return f" Did you mean {' or '.join(f'`{c}`' for c in close)}?" if close else ""
