"""DeepSpeed for a frozen base.

Needs CUDA and the `deepspeed` package, so the tests do not train with it: they check only that
what it reads cannot run code.
"""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_OWN_CLASSES = {
    "deepspeed.runtime.fp16.loss_scaler": ("DynamicLossScaler", "LossScaler"),
    "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
}
"""What DeepSpeed pickles into its own checkpoints."""


class PEFTDeepSpeedStrategy(DeepSpeedStrategy):
    """Train with DeepSpeed ZeRO; checkpoints are DeepSpeed's folders, without frozen parameters.

    DeepSpeed writes its own state dict, whatever the module's hooks leave of it, and reads it
    with an unrestricted unpickler; here only tensors, plain containers and its own classes are
    read.

    Args:
        settings: settings of Lightning's ``DeepSpeedStrategy``; ``exclude_frozen_parameters`` is
            always true.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "exclude_frozen_parameters": True})

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a folder that DeepSpeed wrote; only an explicit ``False`` allows any class in it."""
        if weights_only is False:
            return super().load_checkpoint(checkpoint_path, weights_only)
        with only_safe_loads():
            return super().load_checkpoint(checkpoint_path, weights_only)


@contextmanager
def only_safe_loads() -> Iterator[None]:
    """Make every ``torch.load`` in this block a safe one, whatever its caller asks for."""
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals(list(_own_classes())):
            yield
    finally:
        os.environ.pop(_FORCE)
        if before is not None:
            os.environ[_FORCE] = before


def _own_classes() -> Iterator[type]:
    for module, names in _OWN_CLASSES.items():
        try:
            found = importlib.import_module(module)
        except ImportError:  # another release keeps it elsewhere
            continue
        yield from (getattr(found, name) for name in names if hasattr(found, name))
