"""The `PEFT` callback: parameter-efficient fine-tuning for any LightningModule."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_peft.adapter import Adapter
from lightning_peft.errors import AdapterError
from lightning_peft.method import Method
from lightning_peft.structure.targets import Patterns
from lightning_peft.training import averaging
from lightning_peft.training.hooks import LateHooks, PEFTHooks, adopt_late
from lightning_peft.training.injection import Injection, as_methods
from lightning_peft.training.loading import load_foreign

_Module = TypeVar("_Module", bound=pl.LightningModule)


class PEFT(Callback):
    """Freeze a LightningModule and train an adapter in it instead.

    The model may be built in `__init__`, `setup` or `configure_model`, and `configure_optimizers`
    may pass any parameters: those that are not trained are taken out of the optimizers.
    Checkpoints hold only what is trained, are written atomically, and resume exactly. A fit that
    writes checkpoints ends with a folder `adapter/` beside them.

    Args:
        methods: the method, or several in order.
        name: the adapter's name.
        train: patterns of further modules or parameters to train in place (`"decoder.norm"`).
        head: whether the fresh task head, if the model has one, is trained in place.
        beside: folders of trained adapters to load first, by name (`AdapterFusion`).

    Example::

        trainer = Trainer(callbacks=[PEFT(LoRA(r=16))])
        trainer.fit(module)
        adapter = module.peft_adapter

    Raises:
        TargetError: when the Trainer runs, a pattern matches nothing.
        AdapterError: when the Trainer runs, the model is wrapped, or carries another adapter.
    """

    def __init__(
        self,
        methods: Method | Sequence[Method],
        name: str = "default",
        train: Patterns = (),
        head: bool = True,
        beside: Mapping[str, str] | None = None,
    ) -> None:
        self.injection = Injection(as_methods(methods), name, train, head, beside or {})
        self._module: Any = None

    @property
    def adapter(self) -> Adapter:
        """The adapter, once the Trainer has run.

        Raises:
            AdapterError: the Trainer has not run yet.
        """
        if self._module is None:
            raise AdapterError("There is no adapter yet: it is injected when a Trainer runs.")
        found: Adapter = self._module.peft_adapter
        return found

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Step into the module's hooks; it is injected once it has built its model."""
        if isinstance(pl_module, PEFTHooks) and not isinstance(pl_module, LateHooks):
            raise AdapterError("A PEFTModule injects by itself: leave out the PEFT callback.")
        if any(isinstance(other, PEFT) and other is not self for other in trainer.callbacks):  # type: ignore[attr-defined]
            raise AdapterError(
                "There must be one PEFT callback, but there are several: list their methods in "
                "one, as in `PEFT([LoRA(), Freeze()])`."
            )
        copied = averaging.is_used(trainer, after=self)
        if not is_overridden("configure_model", pl_module):
            averaging.hold_back_warning()
        adopt_late(pl_module, self.injection)
        self._module = pl_module
        if copied:
            pl_module.configure_model()

    @staticmethod
    def load_from_checkpoint(
        cls: type[_Module],  # noqa: PLW0211
        path: str | Path,
        /,
        map_location: Any = "cpu",
        **arguments: Any,
    ) -> _Module:
        """Build a LightningModule with its base, and load into it what was trained.

        Args:
            cls: the class of the module that was trained.
            path: a checkpoint of it.
            map_location: where its tensors go.
            arguments: arguments of the class; the saved hyper-parameters fill in the others.

        Raises:
            CheckpointError: the file is damaged, or does not belong to this base.
        """
        return load_foreign(cls, path, map_location, arguments)
