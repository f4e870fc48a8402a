"""What methods do around an optimizer step; the hooks of a LightningModule call it.

In a loop of one's own, with `step` counted from 0::

    loss.backward()
    before_step(adapter, step, steps)
    optimizer.step()
    after_step(adapter, optimizer, step, steps)
    optimizer.zero_grad()
"""

from collections.abc import Iterator

from torch.optim import Optimizer

from lightning_peft.adapter import Adapter
from lightning_peft.carrying.group import AdapterGroup
from lightning_peft.delta import Delta
from lightning_peft.errors import ConfigError
from lightning_peft.method import Method


def steers(adapter: Adapter | AdapterGroup) -> bool:
    """Whether a method of the adapter acts around optimizer steps."""
    return any(method.steers for method in adapter.methods)


def require_automatic(adapter: Adapter | AdapterGroup, automatic: bool) -> None:
    """Refuse a method that follows the steps where the module optimizes by hand.

    How many steps its loop takes, and with which optimizer, nobody can tell beforehand.

    Raises:
        ConfigError: `automatic` is False and a method acts around optimizer steps.
    """
    for method in () if automatic else adapter.methods:
        if method.steers:
            raise ConfigError(
                f"`{method.kind}` follows the number of optimizer steps, which a module with "
                "`automatic_optimization=False` does not tell: train with automatic optimization."
            )


def before_step(adapter: Adapter, step: int, steps: float) -> None:
    """Let the methods change the gradients, which are complete.

    Args:
        adapter: what is trained.
        step: the optimizer step that is about to be taken, counted from 0.
        steps: how many there are in all.

    Raises:
        ConfigError: a method needs to know how many steps there are, but there is no end.
    """
    for method, deltas in _steering(adapter):
        method.before_step(deltas, step, _finite(method, steps))


def after_step(adapter: Adapter, optimizer: Optimizer, step: int, steps: float) -> None:
    """Let the methods change the parameters, while the gradients are still there.

    Args:
        adapter: what is trained.
        optimizer: which took the step.
        step: the optimizer step that was just taken, counted from 0.
        steps: how many there are in all.

    Raises:
        ConfigError: a method needs to know how many steps there are, but there is no end.
    """
    for method, deltas in _steering(adapter):
        method.after_step(deltas, optimizer, step, _finite(method, steps))


def _steering(adapter: Adapter) -> Iterator[tuple[Method, dict[str, Delta]]]:
    for method in adapter.methods:
        if method.steers:
            yield method, adapter.deltas_of(method)


def _finite(method: Method, steps: float) -> int:
    if steps == float("inf"):
        raise ConfigError(
            f"{type(method).__name__} follows a schedule: `max_steps` or `max_epochs` of the "
            "Trainer must be given."
        )
    return int(steps)
