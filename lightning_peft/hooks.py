"""What a LightningModule does while an adapter trains in it.

`PEFTHooks` stands before the module's own class, in `PEFTModule` by inheritance and in a foreign
module by a change of class (`adopt`), so that it sees every hook on its way to the module: one
place that works wherever the model is built and whatever the module's optimizer code passes.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_peft import checkpoint as content
from lightning_peft.adapter import Adapter, adapters_of
from lightning_peft.delta import plain_name, subclass
from lightning_peft.errors import AdapterError, CheckpointError, NonFiniteError
from lightning_peft.injection import Injection
from lightning_peft.optimizers import keep_trainable


class PEFTHooks:
    """Mixin for a LightningModule that carries an adapter.

    It injects once the model is built, gives optimizers only what is trained, keeps checkpoints
    small and strict, restores random states, and stops before a non-finite step. Its attributes
    start with `peft_`, so that none of the module's own is hidden.
    """

    peft_injection: Injection
    """What to inject, and into which part of the module."""

    peft_pending: bool = True
    """Whether the injection is still to come."""

    peft_buffers: dict[str, Tensor] | None = None
    """All buffers as they were at the injection: those that differ later are saved."""

    _peft_trained: dict[str, nn.Parameter] | None = None
    _peft_loss: Tensor | None = None
    _peft_record: dict[str, Any] | None = None

    @property
    def peft_adapter(self) -> Adapter:
        """The adapter.

        Raises:
            AdapterError: the model was not built yet.
        """
        found = adapters_of(cast(nn.Module, self)).get(self.peft_injection.name)
        if found is None:
            raise AdapterError("There is no adapter yet: it is injected when a Trainer runs.")
        return found

    def setup(self, stage: str) -> None:
        """Have checkpoints written atomically and read without unsafe pickles."""
        super().setup(stage=stage)  # type: ignore[misc]
        content.use_safe_io(cast(Any, self).trainer.strategy)

    def configure_model(self) -> None:
        """Inject, after the module has built its model in whichever hook it does so."""
        super().configure_model()  # type: ignore[misc]
        if self.peft_pending:
            self._peft_inject()

    def configure_optimizers(self) -> Any:
        """Take frozen parameters out of the module's optimizers and put missing ones in."""
        configured = super().configure_optimizers()  # type: ignore[misc]
        keep_trainable(configured, content.trained(self))
        return configured

    def on_fit_start(self) -> None:
        """Check restored optimizers, restore random states, let checkpointing recompute."""
        super().on_fit_start()  # type: ignore[misc]
        self._peft_trained = content.trained(self)
        if self._peft_record is not None:
            content.check_optimizers(self._peft_record, self)
            content.restore_random_state(self._peft_record)
            self._peft_record = None
        _enable_recomputation(cast(nn.Module, self))

    def on_before_backward(self, loss: Tensor) -> None:
        """Remember the loss, to be looked at once a step."""
        super().on_before_backward(loss)  # type: ignore[misc]
        # With several processes only gradients are looked at: they are non-finite on all of them
        # or on none, and a process that stops alone leaves the others waiting.
        if cast(Any, self).trainer.world_size == 1:
            lost = self._peft_loss
            self._peft_loss = loss.detach() if lost is None else lost + loss.detach()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Hold back what a schedule does not train yet; stop before a non-finite step."""
        module = cast(Any, self)
        self.peft_adapter.hold_back(module.current_epoch)
        super().on_before_optimizer_step(optimizer)  # type: ignore[misc]
        loss, self._peft_loss = self._peft_loss, None
        # Under fp16 a scaler looks for overflow itself and skips the step.
        if getattr(module.trainer.precision_plugin, "scaler", None) is None:
            _require_finite(module, loss, self._peft_trained or {})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only what was trained, and say what it belongs to."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        content.reduce(checkpoint, self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another base, method or shape before anything is loaded."""
        self._peft_record = content.open_checkpoint(checkpoint, self)
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        if self._peft_record is not None:
            content.restore_random_state(self._peft_record)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a full state, or one that lacks nothing but what is frozen."""
        if not content.is_reduced(state_dict, self):
            return super().load_state_dict(state_dict, strict, assign)  # type: ignore[misc]
        names = {plain_name(name): name for name in cast(nn.Module, self).state_dict()}
        state = {names.get(name, name): value for name, value in state_dict.items()}
        found = super().load_state_dict(state, False, assign)  # type: ignore[misc]
        if strict and found.unexpected_keys:
            raise CheckpointError(f"`{found.unexpected_keys[0]}` is unexpected in the checkpoint.")
        return found

    def _peft_inject(self) -> None:
        module, injection = cast(nn.Module, self), self.peft_injection
        found = adapters_of(module).get(injection.name)
        if found is None:
            found = injection.into(module.get_submodule(injection.within))
        elif found.methods != injection.methods:
            raise AdapterError(
                f"The model already carries {found!r}, not what is asked for: take it out with "
                "its `remove()`, or build the model anew."
            )
        _ = found.base_fingerprint  # now, while the model is whole: a strategy may shard or cast it
        if self.peft_buffers is None:
            self.peft_buffers = content.persistent_buffers(module)
        self.peft_pending = False


def adopt(module: Any, injection: Injection) -> None:
    """Let `PEFTHooks` stand before the class of a foreign LightningModule; again is harmless."""
    if not isinstance(module, PEFTHooks):
        module.__class__ = subclass(type(module), PEFTHooks)
    module.peft_injection, module.peft_pending = injection, True


def _require_finite(module: Any, loss: Tensor | None, trained: Mapping[str, nn.Parameter]) -> None:
    gradients = {name: p.grad for name, p in trained.items() if p.grad is not None}
    norm = torch.nn.utils.get_total_norm(gradients.values())
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    sum_ = norm if loss is None else norm + loss.to(norm.device)
    if not torch.isfinite(sum_):
        raise NonFiniteError(_diagnosis(module, loss, gradients))


def _diagnosis(module: Any, loss: Tensor | None, gradients: Mapping[str, Tensor]) -> str:
    where = f"at step {module.global_step} of epoch {module.current_epoch}"
    remedy = "nothing was stepped; lower the learning rate or clip gradients, and look at the data"
    if loss is not None and not torch.isfinite(loss):
        return f"The loss is {float(loss)} {where}: {remedy}."
    bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    return f"The gradient of `{[*bad, 'a sum'][0]}` is not finite {where}: {remedy}."


def _enable_recomputation(module: nn.Module) -> None:
    # transformers recomputes a layer only in train mode, and `from_pretrained` returns eval mode.
    # The flag of the layer alone is set: its dropout stays as the user has it.
    for child in module.modules():
        if getattr(child, "gradient_checkpointing", False):
            child.training = True
