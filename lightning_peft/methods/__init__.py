"""The methods: one paper, one file. A new file is found by itself, there is no list to edit."""

import importlib
from pathlib import Path
from typing import Any


def __getattr__(name: str) -> Any:
    # By text, so that only the file that is asked for gets imported.
    for file in sorted(Path(__file__).parent.glob("*.py")) if name.isidentifier() else ():
        if f"\nclass {name}(" in file.read_text(encoding="utf-8"):
            return getattr(importlib.import_module(f"{__name__}.{file.stem}"), name)
    raise AttributeError(f"module `{__name__}` has no method `{name}`")
