"""What a finished run leaves: the best adapter, the report, the curves."""

from collections.abc import Mapping
from typing import Any

from lightning_peft.jobs.run_folder import RunFolder


def finish(settings: Mapping[str, Any], run: RunFolder, baseline: bool) -> None:
    """Export the best adapter and report it."""
