"""Whether methods train a model: what every pair of method and architecture is asked."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from lightning_peft import Adapter, inject
from lightning_peft.config import instantiate
from lightning_peft.delta import SLOT
from lightning_peft.errors import PEFTError
from lightning_peft.method import Method
from lightning_peft.methods.prefix_tuning import ProjectedKeys, Trunk
from lightning_peft.structure.anatomy import head_parameters
from lightning_peft.training.finite import refuse_without_gradient
from tests.zoo.build import Cell, quiet

CONFIGURATIONS = Path(__file__).parents[2] / "conf" / "method"
STEPS, RATE = 2, 1e-3


@dataclass(frozen=True)
class Outcome:
    """What became of a method on an architecture."""

    status: str
    """`ok`, `refused` (a PEFTError told why it cannot be) or `failed`."""

    message: str = ""
    """The error, or what was wrong."""

    idle: tuple[str, ...] = ()
    """What the inputs never reach: the base, when it is trained itself, has no gradient there."""


def methods_of(name: str) -> list[Method]:
    """Return the methods that `conf/method/<name>.yaml` sets, as it sets them."""
    text = (CONFIGURATIONS / f"{name}.yaml").read_text(encoding="utf-8")
    return [instantiate(spec) for spec in yaml.safe_load(text)["method"].values()]


def trains(cell: Cell, methods: Sequence[Method]) -> Outcome:
    """Inject `methods`, take two steps, take them out again, and say how that went.

    Every declared parameter but the head's must have had a gradient that is not zero, frozen
    tensors must keep their bits, the logits must move, and `remove()` must give them back exactly
    (where the methods keep what it takes).
    """
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        try:
            return _trained(cell, methods)
        except PEFTError as error:
            return Outcome("refused", f"{type(error).__name__}: {error}")
        except Exception as error:
            return Outcome("failed", f"{type(error).__name__}: {error}")


def _trained(cell: Cell, methods: Sequence[Method]) -> Outcome:
    unreached = _unreached(cell)
    before, logits = _bits(cell.model), cell.logits()
    heads = set(head_parameters(cell.model))
    adapter = inject(cell.model, methods)
    moved = _step(cell, adapter)
    still = {name for name in adapter.named_parameters() if name not in moved | heads}
    unreached |= _unused_trunks(cell.model, unreached)
    idle = tuple(sorted(n for n in still if {n, _host(n)} & unreached))
    wrong = [f"no gradient: {_some(still - set(idle))}"] if still - set(idle) else []
    if not moved - heads:
        wrong.append("nothing but the head was trained")
    if changed := _changed(cell.model, before, set(adapter.in_place)):
        wrong.append(f"frozen tensors changed: {_some(changed)}")
    if torch.equal(cell.logits(), logits):
        wrong.append("the logits did not move")
    if all(method.keeps_original for method in methods):
        adapter.remove()
        if not torch.equal(cell.logits(), logits):
            wrong.append("the logits are not the base's after remove()")
    return Outcome("failed" if wrong else "ok", "; ".join(wrong), idle)


def _unreached(cell: Cell) -> set[str]:
    """Return the modules and parameters without a gradient even when all of the base is trained.

    Of a module what is no matrix only counts where it owns none, such as norms.
    """
    twin = replace(cell, model=copy.deepcopy(cell.model).train())  # some have no loss in eval mode
    twin.loss().backward()
    owned, reached, simple, silent = set(), set(), set(), set()
    for name, parameter in twin.model.named_parameters(remove_duplicate=False):
        if parameter.dim() > 1:
            parts = name.split(".")[:-1]
            above = {".".join(parts[:i]) for i in range(len(parts) + 1)}
            owned |= above
            reached |= above if parameter.grad is not None and bool(parameter.grad.any()) else set()
        elif parameter.grad is None or not parameter.grad.any():
            simple.add(name.rpartition(".")[0])
        if parameter.grad is None or not parameter.grad.any():
            silent.add(name)
    return (owned - reached) | (simple - owned) | silent


def _unused_trunks(model: nn.Module, unreached: set[str]) -> set[str]:
    """Return the parameters of prefixes' trunks that serve nothing but unreached attention."""
    used = {
        id(trunk)
        for name, keys in model.named_modules()
        if isinstance(keys, ProjectedKeys) and _host(name) not in unreached
        for trunk in keys.shared
    }
    return {
        f"{name}.{parameter}"
        for name, trunk in model.named_modules()
        if isinstance(trunk, Trunk) and id(trunk) not in used
        for parameter, _ in trunk.named_parameters()
    }


def _step(cell: Cell, adapter: Adapter) -> set[str]:
    """Take the steps; return the parameters that had a gradient which is not zero."""
    moved: set[str] = set()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=RATE)
    cell.model.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = cell.loss()
        if not loss.requires_grad:
            refuse_without_gradient(adapter)
        loss.backward()
        named = adapter.named_parameters().items()
        moved |= {n for n, p in named if p.grad is not None and bool(p.grad.any())}
        optimizer.step()
    cell.model.eval()
    return moved


def _host(parameter: str) -> str:
    parts = parameter.split(".")
    return ".".join(parts[: parts.index(SLOT)] if SLOT in parts else parts[:-1])


def _bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _changed(model: nn.Module, before: dict[str, Tensor], in_place: set[str]) -> set[str]:
    owners = {name.rpartition(".")[0] for name in in_place}
    state: dict[str, Any] = dict(model.state_dict())
    kept = {n for n in before if n not in in_place and n.rpartition(".")[0] not in owners}
    tied = {state[n].data_ptr() for n in in_place if n in state}
    kept = {n for n in kept if state[n].data_ptr() not in tied}
    return {n for n in kept if not torch.equal(_raw(state[n]), _raw(before[n]))}


def _raw(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8) if tensor.dim() else tensor[None]


def _some(names: set[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(sorted(names)[:count]) + more
