"""The methods of `conf/method/`, found by glob: a new one is tested as soon as it is there."""

from pathlib import Path

import yaml

from lightning_peft.config import instantiate
from lightning_peft.method import Method


def methods_of(path: Path) -> list[Method]:
    """Return the methods that a file of `conf/method/` sets, in order."""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))["method"]
    return [instantiate(spec) for spec in config.values()]


EVERY = sorted((Path(__file__).parents[1] / "conf" / "method").glob("*.yaml"))
METHODS = [p for p in EVERY if not any(m.builds_on_adapters for m in methods_of(p))]
"""Those that need nothing but a base."""
