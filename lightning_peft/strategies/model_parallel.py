"""FSDP2 for a frozen base: the model is split over processes, checkpoints hold what is trained."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, distributed
from torch.optim import Optimizer

from lightning_peft.errors import CheckpointError, PEFTError
from lightning_peft.files import shards
from lightning_peft.files.checkpoint_io import AtomicCheckpointIO, require_finite
from lightning_peft.strategies.shard import like, shard_children, whole


class PEFTModelParallelStrategy(ModelParallelStrategy):
    """Split a model with a frozen base over processes with FSDP2, on CPUs or GPUs.

    The model is sharded after injection, layer by layer; there is nothing to write in
    ``configure_model``. Checkpoints hold only what is trained. In one file
    (``save_distributed_checkpoint=False``) they are the same as those of one process or of DDP,
    and can be resumed by either; as a folder, each process writes its part as safetensors.
    Neither is ever read with an unrestricted unpickler.

    Lightning's own strategy reads the whole model from a checkpoint before the module's hooks
    can look at it, so a checkpoint of trained tensors alone cannot be loaded, and another base
    goes unnoticed. Here a checkpoint is read first, checked, and then applied.

    Args:
        data_parallel_size: number of processes to split the model over; all by default.
        save_distributed_checkpoint: whether a checkpoint is a folder of shards.
        settings: further settings of Lightning's ``ModelParallelStrategy``.
    """

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        save_distributed_checkpoint: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            **settings,
        )
        self.save_distributed_checkpoint = save_distributed_checkpoint
        self.checkpoint_io = AtomicCheckpointIO()

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The optimizer is restored where Lightning restores it for one process."""
        return True

    def setup_environment(self) -> None:
        """Connect the processes and lay them out."""
        # Private: Lightning's "auto" means the number of nodes, with tensor parallelism inside a
        # node; there is no public way to ask for data parallelism over all processes.
        if self._data_parallel_size == "auto":
            self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: "pl.Trainer") -> None:
        """Shard the model, which was injected before, and set up the optimizers."""
        shard_children(self._module, self.device_mesh["data_parallel"])
        super().setup(trainer)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return what is trained, and buffers; in one piece only on rank 0."""
        parameters = self._module.named_parameters(remove_duplicate=False)
        frozen = {name for name, parameter in parameters if not parameter.requires_grad}
        state = self._module.state_dict()
        return self._gather({name: value for name, value in state.items() if name not in frozen})

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load what was trained."""
        present = self._module.state_dict()
        state = {
            name: like(value, present[name]) if name in present else value
            for name, value in checkpoint["state_dict"].items()
        }
        self._module.load_state_dict(state, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimizer's state, by position; in one piece only on rank 0."""
        state = optimizer.state_dict()
        by_parameter = {n: self._gather(entry) for n, entry in state["state"].items()}
        return {**state, "state": by_parameter}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizers' states, which are matched by position."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = _parameters(optimizer)
            by_parameter = {
                position: {
                    # Only what has a parameter's shape is split like it, not step counters.
                    key: like(value, parameters[position])
                    if isinstance(value, Tensor) and value.shape == parameters[position].shape
                    else value
                    for key, value in entry.items()
                }
                for position, entry in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": by_parameter})

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint; when one process fails, all raise.

        Raises:
            NonFiniteError: a trained tensor holds NaN or infinity.
            CheckpointError: the disk refused.
        """
        path = Path(self.broadcast(filepath))
        if self.save_distributed_checkpoint:
            self._save_shards(checkpoint, path)
        else:
            self._on_rank_zero(lambda: self._save_file(checkpoint, path, storage_options))

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, file or folder, without applying it.

        Raises:
            CheckpointError: it is missing, damaged, or was not saved to its end.
        """
        path = Path(self.broadcast(checkpoint_path))
        if not path.is_dir():
            return self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)
        self._on_rank_zero(lambda: shards.require_complete(path))
        present = self._module.state_dict()
        return shards.read(path, present, [_parameters(o) for o in self.optimizers], weights_only)

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Remove a checkpoint, file or folder."""
        if self.is_global_zero and Path(filepath).is_dir():
            shards.remove(Path(filepath))
        else:
            super().remove_checkpoint(filepath)

    def _save_shards(self, checkpoint: dict[str, Any], path: Path) -> None:
        self._together(lambda: require_finite(checkpoint["state_dict"]))
        try:
            self._on_rank_zero(lambda: shards.prepare(path))
            self._together(lambda: shards.write(checkpoint, path))
            self._on_rank_zero(lambda: shards.finish(checkpoint, path))
        except PEFTError:
            if self.is_global_zero:
                shards.discard(path)
            raise

    def _save_file(self, checkpoint: dict[str, Any], path: Path, options: Any | None) -> None:
        with shards.moved_away(path):
            self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options=options)

    def _gather(self, values: dict[str, Any]) -> dict[str, Any]:
        if self.save_distributed_checkpoint:
            return values
        # Gathering is collective: every process takes part, tensor by tensor, in the same order.
        full = {k: whole(v) if isinstance(v, Tensor) else v for k, v in values.items()}
        return full if self.is_global_zero else {}

    @property
    def _module(self) -> "pl.LightningModule":
        return cast("pl.LightningModule", self.lightning_module)

    def _on_rank_zero(self, action: Callable[[], None]) -> None:
        self._together(action if self.is_global_zero else lambda: None)

    def _together(self, action: Callable[[], None]) -> None:
        """Run `action`, and raise on every process what one of them raised.

        A process that raised alone would leave the others waiting for it.
        """
        error: Exception | None = None
        try:
            action()
        except Exception as raised:
            error = raised
        report = (type(error), str(error)) if isinstance(error, PEFTError) else repr(error)
        reports: list[Any] = [None] * self.world_size
        distributed.all_gather_object(reports, report if error else None)
        if error is not None:
            raise error
        for kind, message in (r if isinstance(r, tuple) else (CheckpointError, r) for r in reports):
            if message is not None:
                raise kind(message)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    """Return an optimizer's parameters in the order in which its state numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
