"""A table before training: what is frozen, what is trained, and the memory that both need."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import nn

from lightning_peft.delta import SLOT
from lightning_peft.report import open_console, readable_bytes, readable_share

_ADAM = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam)
_SHOWN_KINDS = 6


@dataclass
class Part:
    """Parameters of a model that belong together."""

    name: str
    trained: bool
    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    modules: list[str] = field(default_factory=list)
    """Where the parameters are, each place once."""


class TrainingSummary(Callback):
    """Print, once before each fit, which parts of the model are trained and what that costs.

    The memory is computed from the tensors' sizes: weights, gradients and the optimizer's state.
    Activations come on top; they grow with batch size and sequence length, and are not estimated.

    Example::

        Trainer(callbacks=[PEFT(LoRA()), TrainingSummary()], enable_model_summary=False)
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            _show(parts(pl_module), trainer.optimizers, open_console())


def parts(model: nn.Module) -> list[Part]:
    """Split the parameters of `model`, each counted once: base, deltas by method, in place."""
    found: dict[tuple[str, bool], Part] = {}
    for name, parameter in model.named_parameters():
        # The leading dot finds a delta of the root module too.
        place, _, delta = f".{name}".partition(f".{SLOT}.")
        place = (place if delta else place.rpartition(".")[0]).removeprefix(".")
        label = _label(delta, parameter.requires_grad)
        part = found.setdefault(
            (label, parameter.requires_grad), Part(label, parameter.requires_grad)
        )
        part.tensors += 1
        part.parameters += parameter.numel()
        part.bytes += parameter.numel() * parameter.element_size()
        if place not in part.modules:
            part.modules.append(place)
    return sorted(found.values(), key=lambda part: (part.trained, part.name != "base"))


def trained_size(model: nn.Module) -> tuple[int, int]:
    """Return the number of trained parameters and their bytes."""
    trained = [part for part in parts(model) if part.trained]
    return sum(part.parameters for part in trained), sum(part.bytes for part in trained)


def _label(delta: str, trained: bool) -> str:
    if delta:
        return delta.partition(".")[0]
    return "in place" if trained else "base"


def _show(found: list[Part], optimizers: Iterable[torch.optim.Optimizer], to: Console) -> None:
    table = Table(title="What is trained", title_justify="left", title_style="bold")
    for column in ("part", "", "tensors", "parameters", "share", "size", "where"):
        numeric = column in ("tensors", "parameters", "share", "size")
        table.add_column(column, justify="right" if numeric else "left")
    total = sum(part.parameters for part in found)
    for part in found:
        state = Text("trained", "bold green") if part.trained else Text("frozen", "dim")
        numbers = [f"{part.tensors:,}", f"{part.parameters:,}"]
        numbers += [readable_share(part.parameters, total), readable_bytes(part.bytes)]
        table.add_row(escape(part.name), state, *numbers, escape(_where(part)))
    to.print(Group(table, Text(_memory(found, optimizers))))


def _where(part: Part) -> str:
    if not part.trained:
        return ""
    if len(part.modules) == 1:
        return part.modules[0]
    kinds = list(dict.fromkeys(place.rpartition(".")[2] for place in part.modules))
    more = ", …" if len(kinds) > _SHOWN_KINDS else ""
    return f"{len(part.modules)} modules: {', '.join(kinds[:_SHOWN_KINDS])}{more}"


def _memory(found: list[Part], optimizers: Iterable[torch.optim.Optimizer]) -> str:
    weights = sum(part.bytes for part in found)
    gradients = sum(part.bytes for part in found if part.trained)
    states = [_optimizer_bytes(optimizer) for optimizer in optimizers]
    known = sum(state for state in states if state is not None)
    missing = "" if None not in states else " (unknown for this optimizer)"
    return (
        f"Estimated memory: weights {readable_bytes(weights)} + gradients "
        f"{readable_bytes(gradients)} + optimizer state {readable_bytes(known)}{missing} = "
        f"{readable_bytes(weights + gradients + known)}, over all devices; activations come on top."
    )


def _optimizer_bytes(optimizer: torch.optim.Optimizer) -> int | None:
    """Return the bytes of the state that `optimizer` will keep, or None where that is unknown."""
    copies = _state_copies(optimizer)
    if copies is None:
        return None
    groups = optimizer.param_groups
    return copies * sum(p.numel() * p.element_size() for group in groups for p in group["params"])


def _state_copies(optimizer: torch.optim.Optimizer) -> int | None:
    if isinstance(optimizer, _ADAM):
        return 3 if optimizer.defaults.get("amsgrad") else 2
    if isinstance(optimizer, torch.optim.SGD):
        return 1 if optimizer.defaults["momentum"] else 0
    return None
