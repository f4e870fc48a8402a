"""The folder `adapter/` that a fit leaves behind."""

from pathlib import Path
from typing import Any

from lightning_peft.adapter import Adapter
from lightning_peft.carrying.group import AdapterGroup
from lightning_peft.files.adapter_folder import write_adapter
from lightning_peft.files.checkpoint_io import is_remote
from lightning_peft.strategies.shard import whole


def save_final(trainer: Any, adapter: Adapter | AdapterGroup) -> Path | None:
    """Write the adapter, or each of a group, as it is at the end of a fit with a `ModelCheckpoint`.

    Every process calls this, the first one writes. The folder is `adapter/` beside a folder of
    checkpoints that is named `checkpoints`, as Lightning's own is, and else inside it.

    Returns:
        The folder; None when no checkpoints are written, or not to this machine's disk.

    Raises:
        CheckpointError: the folder cannot be written, or a tensor holds NaN or infinite values.
    """
    place = getattr(trainer.checkpoint_callback, "dirpath", None)
    if place is None or trainer.fast_dev_run or is_remote(place):
        return None
    checkpoints = Path(place)
    parent = checkpoints.parent if checkpoints.name == "checkpoints" else checkpoints
    members = adapter.adapters if isinstance(adapter, AdapterGroup) else {"": adapter}
    for name, member in members.items():
        # Collective: a sharded tensor is gathered from all processes.
        state = {key: whole(tensor) for key, tensor in member.state_dict().items()}
        if trainer.is_global_zero:
            write_adapter(member, state, parent / "adapter" / name)
    return parent / "adapter"
