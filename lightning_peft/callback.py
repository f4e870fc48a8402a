"""The `PEFT` callback: parameter-efficient fine-tuning for any LightningModule."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_peft import checkpoint as content
from lightning_peft.adapter import Adapter
from lightning_peft.errors import AdapterError
from lightning_peft.files.checkpoint_io import AtomicCheckpointIO
from lightning_peft.hooks import PEFTHooks, adopt
from lightning_peft.injection import Injection, as_methods
from lightning_peft.method import Method
from lightning_peft.targets import Patterns

_Module = TypeVar("_Module", bound=pl.LightningModule)


class PEFT(Callback):
    """Freeze a LightningModule and train an adapter in it instead.

    The model may be built in `__init__`, `setup` or `configure_model`, and `configure_optimizers`
    may pass any parameters: those that are not trained are taken out of the optimizers.
    Checkpoints hold only what is trained, are written atomically, and resume exactly.

    Args:
        methods: the method, or several in order.
        name: the adapter's name.
        train: patterns of further modules or parameters to train in place (`"decoder.norm"`).
        head: whether the fresh task head, if the model has one, is trained in place.

    Example::

        trainer = Trainer(callbacks=[PEFT(LoRA(r=16))])
        trainer.fit(module)
        trainer_adapter = module.peft_adapter

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
    ) -> None:
        self.injection = Injection(as_methods(methods), name, train, head)
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
        if type(pl_module).__mro__[1] is PEFTHooks and not hasattr(type(pl_module), "_made_of"):
            raise AdapterError("A PEFTModule injects by itself: leave out the PEFT callback.")
        adopt(pl_module, self.injection)
        self._module = pl_module

    @staticmethod
    def load_from_checkpoint(
        cls: type[_Module], path: str | Path, map_location: Any = "cpu", **arguments: Any
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
        loaded = AtomicCheckpointIO().load_checkpoint(path, map_location)
        module: Any = cls(**{**_saved_arguments(cls, loaded), **arguments})
        adopt(module, Injection.from_spec(content.record_of(loaded, path)))
        if next(module.parameters(), None) is None:  # built where a Trainer would build it
            super(PEFTHooks, module).setup(stage="predict")
        module.configure_model()
        module.on_load_checkpoint(loaded)
        module.load_state_dict(loaded["state_dict"])
        return module  # type: ignore[no-any-return]


def _saved_arguments(cls: type[pl.LightningModule], loaded: dict[str, Any]) -> dict[str, Any]:
    saved = dict(loaded.get(cls.CHECKPOINT_HYPER_PARAMS_KEY, {}))
    parameters = inspect.signature(cls.__init__).parameters
    if (whole := loaded.get(cls.CHECKPOINT_HYPER_PARAMS_NAME)) in parameters:
        return {str(whole): saved}
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return saved
    return {name: value for name, value in saved.items() if name in parameters}
