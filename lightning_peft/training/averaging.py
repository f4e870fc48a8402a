"""Lightning's averages of weights (EMA, SWA) beside a frozen base.

The callbacks copy the whole module in their `setup`, so the adapter must be in it by then. The
average of equal numbers rounds, so that the base in the copy drifts and is then copied back.
"""

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor

from lightning_peft.delta import plain_name
from lightning_peft.errors import ConfigError
from lightning_peft.training import checkpoint as content
from lightning_peft.training.modes import HeldInEval

_AVERAGING: Any = getattr(callbacks, "WeightAveraging", ())  # since Lightning 2.6


def is_used(trainer: "pl.Trainer", after: pl.Callback) -> bool:
    """Whether a callback of `trainer` copies the module in its `setup`.

    Raises:
        ConfigError: it stands before the callback `after`, and copies the bare base.
    """
    found = [
        c for c in _callbacks(trainer) if isinstance(c, (_AVERAGING, StochasticWeightAveraging))
    ]
    for callback in found:
        if _callbacks(trainer).index(callback) < _callbacks(trainer).index(after):
            raise ConfigError(
                f"`callbacks` must list {type(after).__name__} before {type(callback).__name__}, "
                "which copies the module as soon as it is set up, but lists it behind."
            )
    return bool(found)


def hold_back_warning() -> None:
    """Hold back a warning that the user's class builds its model late, where only we inject."""
    warnings.filterwarnings("ignore", "You're using the WeightAveraging callback with a model that")


def check(module: pl.LightningModule) -> None:
    """Refuse what would overwrite statistics of the frozen base.

    Raises:
        ConfigError: stochastic weight averaging, and a frozen normalisation.
    """
    swa = any(isinstance(c, StochasticWeightAveraging) for c in _callbacks(module.trainer))
    if swa and any(isinstance(child, HeldInEval) for child in module.modules()):
        raise ConfigError(
            "StochasticWeightAveraging resets the running statistics of every normalisation, those "
            "of the frozen base too: use `EMAWeightAveraging`, or train the normalisations."
        )


def keep_base(module: Any) -> None:
    """Copy what is frozen, bitwise, into the copies that callbacks average."""
    # Private, and there is no other way to it.
    averages = [c._average_model for c in _callbacks(module.trainer) if isinstance(c, _AVERAGING)]
    if not any(average is not None for average in averages):
        return
    frozen = dict(_tensors(module)).keys() - content.own_tensors(module).keys()
    for average in averages:
        for (name, ours), (_, theirs) in zip(
            _tensors(module), _tensors(average.module), strict=True
        ):
            if name in frozen:
                theirs.data.copy_(ours.data)


def _tensors(module: pl.LightningModule) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        yield plain_name(name), tensor


def _callbacks(trainer: "pl.Trainer") -> list[pl.Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]
