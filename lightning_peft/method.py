"""A method is a set of frozen settings that says what an adapter adds to a model."""

from abc import ABC
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.adapter import Adapter
from lightning_peft.delta import Delta
from lightning_peft.errors import ConfigError
from lightning_peft.structure.anatomy import head_parameters
from lightning_peft.structure.targets import Patterns, trained_in_place


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Settings of one parameter-efficient method; it holds no state and touches no module."""

    kind: ClassVar[str]
    """The method's short name: its key in a configuration and in state-dict keys."""

    keeps_original: ClassVar[bool] = True
    """Whether what is trained in place is kept in its first state, to be restored."""

    starts_as_base: ClassVar[bool] = True
    """Whether a fresh adapter leaves every output bitwise as it was."""

    builds_on_adapters: ClassVar[bool] = False
    """Whether the method needs adapters that the model carries already."""

    starts_from_data: ClassVar[bool] = False
    """Whether the method looks at the inputs of its hosts in the first forward pass of training."""

    steers: ClassVar[bool] = False
    """Whether the method acts before or after optimizer steps."""

    def deltas(self, model: nn.Module) -> dict[str, Delta]:
        """Return the deltas to attach by the dotted name of their host module."""
        return {}

    def in_place(self, model: nn.Module) -> Sequence[str]:
        """Return the names of the model's own parameters to train in place."""
        return ()

    def start_epochs(self, model: nn.Module) -> dict[str, int]:
        """Return, by name, the epoch from which a parameter is trained, where it is not 0."""
        return {}

    def lr_scale(self, parameter: str) -> float:
        """Return by what factor a parameter of a delta (`lora_B`) learns faster than others."""
        return 1.0

    def start_from(self, delta: Delta, x: Tensor) -> None:  # noqa: B027
        """Initialise a fresh delta by what its host receives, if the method `starts_from_data`.

        The outputs must stay what they are, since the forward pass that shows `x` goes on.

        Args:
            delta: one of the method's; where it was trained before, it must be left as it is.
            x: the inputs of its host in the first batch, `(rows, in)`, without padding.
        """

    def before_step(  # noqa: B027
        self, deltas: Mapping[str, Delta], step: int, steps: int
    ) -> None:
        """Change the gradients, which are complete, before an optimizer step, if it `steers`.

        Args:
            deltas: the method's deltas by the name of their host.
            step: the optimizer step that is about to be taken, counted from 0.
            steps: how many there are in all.
        """

    def after_step(  # noqa: B027
        self, deltas: Mapping[str, Delta], optimizer: Optimizer, step: int, steps: int
    ) -> None:
        """Change the parameters after an optimizer step, if it `steers`; gradients are still there.

        What must be kept from step to step belongs into `optimizer.state[parameter]`, as tensors of
        the parameter's shape or smaller: it is then in every checkpoint, and in no adapter's file.

        Args:
            deltas: the method's deltas by the name of their host.
            optimizer: which took the step.
            step: the optimizer step that was just taken, counted from 0.
            steps: how many there are in all.
        """


@torch.inference_mode(False)  # what is made here is trained, whatever context it is made in
def inject(
    model: nn.Module,
    methods: Method | Sequence[Method],
    name: str = "default",
    *,
    train: Patterns = (),
    head: bool = True,
) -> Adapter:
    """Freeze `model` and inject one method, or several in order, to be trained together.

    Args:
        model: any module; its class, state-dict keys and frozen tensors stay what they are.
        methods: the method or methods.
        name: the adapter's name, made of letters, digits, `_` and `-`.
        train: patterns of further modules or parameters of the model to train in place.
        head: whether the fresh task head, if the model has one, is trained in place too.

    Returns:
        The handle on what was injected.

    Raises:
        TargetError: a pattern matches nothing; the model is left as it was.
        AdapterError: the model already carries an adapter of that name.
    """
    methods = (methods,) if isinstance(methods, Method) else tuple(methods)
    # What acts during training finds its deltas by the method's kind.
    acting = [m.kind for m in methods if m.steers or type(m).lr_scale is not Method.lr_scale]
    if twice := [kind for kind, n in Counter(acting).items() if n > 1]:
        raise ConfigError(
            f"`methods` must hold `{twice[0]}` once, but holds it more than once: inject two "
            "adapters instead."
        )
    deltas = [(h, f"{name}_{m.kind}", d) for m in methods for h, d in m.deltas(model).items()]
    in_place = [n for m in methods for n in m.in_place(model)]
    in_place += trained_in_place(model, train) if train else []
    in_place += head_parameters(model) if head else []
    return Adapter(model, name, methods, deltas, in_place)
