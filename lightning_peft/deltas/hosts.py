"""Which modules a product of two small factors changes, and the delta for each."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_peft.delta import Delta
from lightning_peft.deltas.low_rank import Product, Site
from lightning_peft.deltas.sites import site_of
from lightning_peft.errors import TargetError, near_misses
from lightning_peft.structure import anatomy
from lightning_peft.structure.targets import Fits, Patterns, Targets, as_targets, matches

ADAPTABLE = "Linear, Conv1D, Embedding, Conv1d, Conv2d, MultiheadAttention and fused experts"


def can_adapt(module: nn.Module) -> bool:
    """Whether a product can change a weight of the module."""
    called = anatomy.is_linear(module) or isinstance(module, nn.Embedding | nn.Conv1d | nn.Conv2d)
    return called or bool(anatomy.read_weights(module))


def deltas_for(
    model: nn.Module,
    hosts: Mapping[str, nn.Module],
    make: Callable[[str, Site, Tensor], Product],
) -> dict[str, Delta]:
    """Return a delta for each of `hosts`, whose products `make` builds.

    Args:
        model: which holds the hosts.
        hosts: by their names in the model.
        make: takes a host's name, a site and the weight there.
    """
    read = anatomy.read_by_parents(model)
    return {
        name: _delta_for(host, functools.partial(make, name), name in read)
        for name, host in hosts.items()
    }


def _delta_for(host: Any, make: Callable[[Site, Tensor], Product], read: bool) -> Delta:
    names = ["weight"] if read else anatomy.read_weights(host)
    if not names:
        return make(site_of(host), host._parameters["weight"])
    turned = getattr(host, "is_transposed", False)
    weights: dict[str, Tensor] = {name: host._parameters[name] for name in names}
    return Parts({n: make(Site(tuple(w.shape), turned), w) for n, w in weights.items()})


def is_whole(module: nn.Module) -> bool:
    """Whether a product can change the module, which is no convolution in groups."""
    return can_adapt(module) and getattr(module, "groups", 1) == 1


def has_matrix(module: nn.Module) -> bool:
    """Whether a product can change the module and its weights are matrices of plain numbers."""
    weights = [p for p in module._parameters.values() if p is not None and p.dim() > 1]
    plain = all(weight.is_floating_point() for weight in weights) and bool(weights)
    return is_whole(module) and plain


_BESIDES: dict[Fits, str] = {
    is_whole: ", not in groups",
    has_matrix: ", neither quantised nor in groups",
}
"""What a method asks of its hosts besides, in words."""


class Parts(Delta):
    """Changes of weights that are read as tensors: of fused experts, of `MultiheadAttention`."""

    def __init__(self, parts: Mapping[str, Product]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.additive = all(part.additive for part in parts.values())

    def reweigh(self, host: nn.Module, name: str, weight: Tensor) -> Tensor:
        """Return a weight with its change."""
        part: Any = self._modules.get(name)
        return weight if part is None else part.changed(weight)

    def merge(self, module: nn.Module) -> None:
        """Fold each change into its weight."""
        for name, part in self.named_children():
            part.merge_into(module, name)  # type: ignore[operator]


def find_hosts(
    model: nn.Module,
    targets: Targets | Patterns | None,
    layers: Sequence[int] | None,
    fits: Fits = can_adapt,
) -> dict[str, nn.Module]:
    """Return the modules that a method of the family changes, by name."""
    return as_targets(targets, layers).find(model, fits, ADAPTABLE + _BESIDES.get(fits, ""))


def check_patterns(patterns: Sequence[str], hosts: Mapping[str, nn.Module], method: str) -> None:
    """Refuse a pattern that matches none of the hosts.

    Raises:
        TargetError: it matches none; near misses are named.
    """
    for pattern in patterns:
        if not any(matches(pattern, name) for name in hosts):
            close = near_misses(pattern, {name.rpartition(".")[2] for name in hosts})
            raise TargetError(f"`{pattern}` in a pattern of {method} matches no target.{close}")


def first_match(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return the value of the first pattern that matches, or the default."""
    return next((value for p, value in patterns.items() if matches(p, name)), default)
