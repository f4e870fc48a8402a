"""What a LightningModule does while an adapter trains in it.

By a change of the module's class (`adopt`) `PEFTHooks` stands before it and sees every hook on its
way to the module: one place that works wherever the model is built, whatever the module's optimizer
code passes, and also where a hook of the user's does not call the one of its parent.
"""

import types
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from lightning_peft.adapter import Adapter
from lightning_peft.carrying.group import AdapterGroup, single
from lightning_peft.errors import AdapterError
from lightning_peft.marker import subclass, superclass
from lightning_peft.training import averaging, finite, modes, random_state, steps, warm_start
from lightning_peft.training import checkpoint as content
from lightning_peft.training.export import save_final
from lightning_peft.training.injection import Injection
from lightning_peft.training.optimizers import check_scales, keep_trainable, optimizers_in


class PEFTHooks:
    """Mixin for a LightningModule that carries an adapter.

    It gives optimizers only what is trained, keeps checkpoints small and strict, restores random
    states, stops before a non-finite step, and writes the trained adapter at the end. Its
    attributes start with `peft_`, so that none of the module's own is hidden.
    """

    peft_injection: Injection
    """What to inject, and into which part of the module."""

    peft_buffers: dict[str, Tensor] | None = None
    """All buffers as they were at the injection: those that differ later are saved."""

    peft_export: bool = True
    """Whether the end of a fit writes `adapter/` beside the folder of the checkpoints."""

    _peft_fitted: Adapter | AdapterGroup | None = (
        None  # set from the true start of a fit on, not by a tuner
    )
    _peft_loss: Tensor | None = None
    _peft_watch: warm_start.Watch | None = None  # in the first batch, by methods that look at it
    _peft_record: Mapping[str, Any] | None = None  # of a checkpoint that a fit resumes from
    _peft_before: Mapping[str, Tensor] = types.MappingProxyType({})  # what it overwrote

    @property
    def peft_adapter(self) -> Adapter | AdapterGroup:
        """The adapter, or those that are trained side by side.

        Raises:
            AdapterError: there is none: not yet, or not any more.
        """
        found = self.peft_injection.found_in(cast(nn.Module, self))
        if found is None:
            raise AdapterError(
                f"There is no adapter `{self.peft_injection.name}`: it is injected when a Trainer "
                "runs, and was not yet, or it was removed or merged."
            )
        return found

    def peft_inject(self) -> None:
        """Inject what `peft_injection` says, or take over the equal adapter that is there."""
        adapter = self.peft_injection.into(cast(nn.Module, self))
        _ = adapter.base_fingerprint  # now, while the model is whole: a strategy may shard it
        if self.peft_buffers is None:
            self.peft_buffers = content.persistent_buffers(cast(nn.Module, self))

    def configure_model(self) -> None:
        """Let an adapter that another one had displaced act and be trained, before a fit."""
        super().configure_model()  # type: ignore[misc]
        adapter = self.peft_injection.found_in(cast(nn.Module, self))
        if content.is_fitting(self) and adapter is not None:
            adapter.settle()

    def setup(self, stage: str) -> None:
        """Have checkpoints written atomically and read without unsafe pickles."""
        super().setup(stage=stage)  # type: ignore[misc]
        self._peft_fitted = self._peft_loss = self._peft_record = self._peft_watch = None
        self._peft_before = {}
        content.use_safe_io(cast(Any, self).trainer.strategy)

    def configure_optimizers(self) -> Any:
        """Leave in the module's optimizers what is trained, and let layers recompute."""
        configured = super().configure_optimizers()  # type: ignore[misc]
        keep_trainable(configured, content.trained(self))
        check_scales(configured, self.peft_adapter)
        for optimizer in optimizers_in(configured) if steps.steers(self.peft_adapter) else ():
            optimizer.register_step_post_hook(self._peft_after_step)
        # Here, since a learning-rate finder trains before `on_fit_start` comes to the module.
        modes.prepare(cast(nn.Module, self), self.peft_injection.within)
        return configured

    def on_fit_start(self) -> None:
        """Check restored optimizers and restore random states."""
        super().on_fit_start()  # type: ignore[misc]
        if self._peft_record is not None:
            content.check_optimizers(self._peft_record, self, self._peft_before)
            # A module that asked for the number of steps has begun to draw batches since the load.
            if cast(Any, self).trainer.train_dataloader is None:
                random_state.restore(self._peft_record["random"])
            self._peft_before = {}
        self._peft_fitted = self.peft_adapter
        steps.require_automatic(self.peft_adapter, cast(Any, self).automatic_optimization)
        averaging.check(cast(Any, self))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        """Let methods that start from data see the first batch, unless the run is resumed."""
        skip = super().on_train_batch_start(batch, batch_idx)  # type: ignore[misc]
        first = self._peft_record is None and cast(Any, self).trainer.global_step == batch_idx == 0
        if first and warm_start.starts_from_data(self.peft_adapter):
            one = single(self.peft_adapter, "a start from data")
            self._peft_watch = warm_start.Watch(one, warm_start.mask_in(batch))
        return skip

    def on_before_backward(self, loss: Tensor) -> None:
        """Remember the loss, to be looked at once a step."""
        super().on_before_backward(loss)  # type: ignore[misc]
        if not loss.requires_grad:
            finite.refuse_without_gradient(self.peft_adapter)
        if self._peft_watch is not None:
            self._peft_watch.close()
            self._peft_watch.require_seen()
        self._peft_record = None
        if finite.is_watched(loss, cast(Any, self).trainer):
            lost = self._peft_loss
            self._peft_loss = loss.detach() if lost is None else lost + loss.detach()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Hold back what a schedule does not train yet; stop before a non-finite step."""
        if self._peft_fitted is not None:
            self._peft_fitted.hold_back(cast(Any, self).current_epoch)
            if steps.steers(self._peft_fitted):
                one = single(self._peft_fitted, "before_step()")
                steps.before_step(one, *self._peft_progress())
        if self._peft_watch is not None:
            warm_start.share(self._peft_watch)
            self._peft_watch = None
        super().on_before_optimizer_step(optimizer)  # type: ignore[misc]
        loss, self._peft_loss = self._peft_loss, None
        if self._peft_fitted is not None:  # a learning-rate finder diverges on purpose
            finite.require_finite(cast(Any, self), loss, optimizer)

    def _peft_after_step(self, optimizer: Any, *_: Any) -> None:
        if self._peft_fitted is not None:
            one = single(self._peft_fitted, "after_step()")
            steps.after_step(one, optimizer, *self._peft_progress())

    def _peft_progress(self) -> tuple[int, float]:
        """Return the present optimizer step, counted from 0, and how many there are in all."""
        trainer = cast(Any, self).trainer
        return trainer.global_step, trainer.estimated_stepping_batches

    def on_validation_start(self) -> None:
        """Keep the base exact in what an averaging callback is about to swap in."""
        super().on_validation_start()  # type: ignore[misc]
        averaging.keep_base(cast(Any, self))

    def on_train_epoch_end(self) -> None:
        """Keep the base exact in what an averaging callback copies in at the end."""
        super().on_train_epoch_end()  # type: ignore[misc]
        averaging.keep_base(cast(Any, self))
        # A run that resumes from the end of a validation ends that epoch first, with a loader that
        # has drawn a random seed and is then thrown away.
        if self._peft_record is not None:
            random_state.restore(self._peft_record["random"])

    def on_train_end(self) -> None:
        """Write the trained adapter to a folder, while processes are still connected."""
        super().on_train_end()  # type: ignore[misc]
        if self._peft_fitted is not None and self.peft_export:
            save_final(cast(Any, self).trainer, self._peft_fitted)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only what was trained, and say what it belongs to."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        if self.peft_injection.found_in(cast(nn.Module, self)) is not None:
            content.reduce(checkpoint, self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another base, method or shape before anything is loaded."""
        record = content.open_checkpoint(checkpoint, self)
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        if record is not None and content.is_fitting(self):
            self._peft_record, self._peft_before = record, content.snapshot(self)
            random_state.restore(record["random"])

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load a full state, or one that lacks nothing but what is frozen."""
        if content.is_reduced(state_dict, self):
            state_dict = content.completed(state_dict, self)
        return super().load_state_dict(state_dict, *args, **kwargs)  # type: ignore[misc]


class LateHooks(PEFTHooks):
    """The hooks in a foreign module, which builds its model wherever it likes."""

    peft_pending: bool = True
    """Whether the injection is still to come."""

    def setup(self, stage: str) -> None:
        """Step out of the module when its adapter was taken out since the last run."""
        super().setup(stage)
        gone = self.peft_injection.found_in(cast(nn.Module, self)) is None
        if not self.peft_pending and gone:
            self.__class__ = superclass(type(self))

    def configure_model(self) -> None:
        """Inject, after the module has built its model in whichever hook it does so."""
        super().configure_model()
        if self.peft_pending:
            self.peft_inject()
            self.peft_pending = False


def adopt(module: Any, injection: Injection) -> None:
    """Inject into a LightningModule, and let the hooks stand before its class."""
    averaging.hold_back_warning()
    module.__class__ = subclass(cast(type, type(module)), PEFTHooks)
    module.peft_injection = injection
    module.peft_inject()


def adopt_late(module: Any, injection: Injection) -> None:
    """Let the hooks stand before a module that may not have built its model; again is harmless."""
    if not isinstance(module, LateHooks):
        module.__class__ = subclass(cast(type, type(module)), LateHooks)
    module.peft_injection, module.peft_pending = injection, True
