"""The methods: one paper, one file. A new file is found by itself, there is no list to edit."""

import importlib
import pkgutil
from typing import Any


def __getattr__(name: str) -> Any:
    for found in pkgutil.iter_modules(__path__) if not name.startswith("_") else ():
        module = importlib.import_module(f"{__name__}.{found.name}")
        if getattr(getattr(module, name, None), "__module__", None) == module.__name__:
            return getattr(module, name)
    raise AttributeError(f"module `{__name__}` has no method `{name}`")
