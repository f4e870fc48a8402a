"""FSDP (the first) for a frozen base, with checkpoints that cannot run code.

Needs CUDA: torch's FSDP does not run on CPUs, so the tests do not train with it. Prefer
`PEFTModelParallelStrategy` (FSDP2), which is tested from end to end: FSDP packs the frozen and the
trained parameters of a unit into one, and makes a gradient for all of it.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    OptimStateKeyType,
    StateDictType,
)

from lightning_peft.delta import plain_name
from lightning_peft.files.checkpoint_io import AtomicCheckpointIO


class PEFTFSDPStrategy(FSDPStrategy):
    """Split a model with a frozen base over CUDA GPUs with FSDP.

    Lightning's own reads a checkpoint with an unrestricted unpickler and before the module's
    hooks can look at it. Here it is read safely first, checked, and then applied. Checkpoints
    are single files of what was trained.

    Args:
        settings: settings of Lightning's ``FSDPStrategy``; ``use_orig_params`` and
            ``state_dict_type`` are fixed, since trained and frozen parameters stand side by side.
    """

    def __init__(self, **settings: Any) -> None:
        fixed = {"use_orig_params": True, "state_dict_type": "full"}
        super().__init__(**{**settings, **fixed})
        self.checkpoint_io = AtomicCheckpointIO()

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The optimizer is restored where Lightning restores it for one process."""
        return True

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint without applying it.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        path = self.broadcast(checkpoint_path)
        return self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Copy what was trained into the model, one FSDP unit at a time."""
        model = cast(nn.Module, self.model)
        names = {id(t): plain_name(name) for name, t in _named_tensors(model)}
        state = checkpoint["state_dict"]
        for unit in FullyShardedDataParallel.fsdp_modules(model):
            with FullyShardedDataParallel.summon_full_params(unit, recurse=False):
                for tensor in _tensors(unit.module):
                    if (name := names[id(tensor)]) in state:
                        tensor.data.copy_(state[name])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizers' states, which Lightning numbers by the model's parameters."""
        fsdp, model = FullyShardedDataParallel, cast(nn.Module, self.model)
        whole = (
            StateDictType.FULL_STATE_DICT,
            FullStateDictConfig(rank0_only=False),
            FullOptimStateDictConfig(rank0_only=False),
        )
        with fsdp.state_dict_type(model, *whole):
            for optimizer, state in zip(
                self.optimizers, checkpoint["optimizer_states"], strict=True
            ):
                named = fsdp.rekey_optim_state_dict(state, OptimStateKeyType.PARAM_NAME, model)
                optimizer.load_state_dict(fsdp.optim_state_dict_to_load(model, optimizer, named))


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters and buffers of one FSDP unit, without those of units inside it."""
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
    for child in module.children():
        if not isinstance(child, FullyShardedDataParallel):
            yield from _tensors(child)
