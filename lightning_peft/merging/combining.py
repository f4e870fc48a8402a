"""Adapters that were trained apart, combined into a new one with a weight for each.

Changes of weights become a LoRA. `sum` stacks the factors of LoRA's family and gives exactly
Σ w_i ΔW_i, at the sum of the ranks; `svd` is the nearest to that of a lower rank. Ways that end in
`_svd` work on the entries of ΔW_i, whatever method made it. `linear`, `ties` and the others without
that ending work on the entries of A and of B, each with √(w_i s_i), as peft does: cheap, but B A
then holds products of one adapter's B with another's A. What changes no weight, or is trained in
place, is combined entry by entry, counted from where it started.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Generator, Tensor, nn

from lightning_peft.adapter import Adapter
from lightning_peft.carrying.registry import adapters_of
from lightning_peft.delta import SLOT, Delta
from lightning_peft.deltas.low_rank import Product
from lightning_peft.deltas.weight_delta import WeightDelta
from lightning_peft.errors import AdapterError, near_misses
from lightning_peft.merging.joining import is_joinable, joined, lora_for, write_factors
from lightning_peft.method import Method, inject
from lightning_peft.ops.combine import combined
from lightning_peft.structure.targets import exactly

How = Literal[
    "sum", "cat", "linear", "svd", "magnitude_prune", "magnitude_prune_svd", "ties", "ties_svd",
    "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
]  # fmt: skip
"""The ways to combine; `cat` is peft's word for `sum`, of factors alone."""


@dataclass(frozen=True)
class Recipe:
    """What `combine` was asked for, checked."""

    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    how: str
    density: float
    rank: int | None
    generator: Generator

    @property
    def rule(self) -> str:
        """The rule of `ops.combine` that entries follow."""
        rule = self.how.removesuffix("_svd")
        return "linear" if rule in ("sum", "cat", "svd") else rule

    def mixed(self, changes: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
        """Return the combination of changes of one tensor, in full precision."""
        chosen = self.weights if weights is None else weights
        return combined(changes, chosen, self.rule, self.density, self.generator)


@torch.no_grad()
def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    how: How = "sum",
    name: str = "mix",
    *,
    density: float | None = None,
    rank: int | None = None,
    seed: int = 0,
    in_place: str | None = None,
) -> Adapter:
    """Inject a new adapter that combines adapters which `model` carries; those stay as they are.

    Args:
        model: which carries them.
        weights: a weight for each adapter by its name, also negative; they need not add up to 1,
            except where something was trained whose start is not known (prefixes, bottlenecks).
        how: `sum` is the weighted sum of the changes; the others are explained above.
        name: of the new adapter, which is active afterwards and can be trained on.
        density: share of entries that `ties`, `dare` and `magnitude_prune` keep, in (0, 1].
        rank: of the result where `how` ends in `svd`; None takes the largest of the given ones.
        seed: of what DARE leaves out.
        in_place: the adapter whose head, and what else it trained in place, to take as it is; None
            combines that too, as changes of the base's.

    Returns:
        The new adapter. The `scale` of the given ones does not enter: they are taken as trained.

    Raises:
        AdapterError: they cannot be combined in this way; nothing is changed.
    """
    recipe = _recipe(model, weights, how, density, rank, seed)
    factors, entries = joined(recipe), _entries(recipe)
    own = _in_place(recipe, in_place)
    methods = [*([lora_for(factors)] if factors else []), *_kept(recipe, in_place)]
    trained = [name for name in own if name in _trained(recipe, in_place)]
    mix = inject(recipe.adapters[0].model, methods, name, train=exactly(trained), head=False)
    try:
        write_factors(mix, factors)
        added = {place.key(name): tensor for place, tensor in entries.items()}
        mix.load_state_dict(mix.state_dict() | added | own)
    except BaseException:
        mix.remove()
        raise
    return mix


def _recipe(
    model: nn.Module,
    weights: Mapping[str, float],
    how: str,
    density: float | None,
    rank: int | None,
    seed: int,
) -> Recipe:
    adapters = tuple(_found(model, name) for name in weights)
    if not adapters or not all(math.isfinite(weight) for weight in weights.values()):
        raise AdapterError(
            f"`weights` must give each adapter a finite number, but is {dict(weights)} instead."
        )
    if how not in get_args(How):
        raise AdapterError(
            f"`how` must be one of {', '.join(get_args(How))}, but is {how!r} instead."
            f"{near_misses(how, get_args(How))}"
        )
    if len({id(adapter.model) for adapter in adapters}) > 1:
        raise AdapterError("`weights` must name adapters of one model, but they lie in several.")
    _check_settings(how, density, rank)
    generator = torch.Generator().manual_seed(seed)
    return Recipe(
        adapters, tuple(weights.values()), how, 1.0 if density is None else density, rank, generator
    )


def _found(model: nn.Module, name: str) -> Adapter:
    present = adapters_of(model)
    if name not in present:
        raise AdapterError(
            f"`weights` must name adapters that the model carries ({', '.join(present) or 'none'}),"
            f" but names {name!r}.{near_misses(name, present)}"
        )
    return present[name]


def _check_settings(how: str, density: float | None, rank: int | None) -> None:
    thins = how.startswith(("ties", "dare", "magnitude"))
    if thins != (density is not None) or not 0 < (1.0 if density is None else density) <= 1:
        needed = "lie in (0, 1]" if thins else "be None"
        raise AdapterError(f"`density` must {needed} for `how={how!r}`, but is {density} instead.")
    if rank is not None and (rank < 1 or not how.endswith("svd")):
        needed = "be at least 1" if how.endswith("svd") else "be None"
        raise AdapterError(f"`rank` must {needed} for `how={how!r}`, but is {rank} instead.")


@dataclass(frozen=True)
class _Entry:
    """Where a trained tensor is that is combined entry by entry."""

    host: str
    kind: str
    name: str

    def key(self, adapter: str) -> str:
        """Return its key in the state dict for an adapter of that name."""
        return f"{self.host}.{SLOT}.{adapter}_{self.kind}.{self.name}".lstrip(".")


def _entries(recipe: Recipe) -> dict[_Entry, Tensor]:
    deltas = [_others(adapter, recipe.how) for adapter in recipe.adapters]
    for adapter, found in zip(recipe.adapters, deltas, strict=True):
        if found.keys() != deltas[0].keys():
            raise AdapterError(_unlike(recipe.adapters[0], adapter, recipe.how))
    if deltas[0] and recipe.how.endswith(("svd", "cat")):
        kinds = sorted({kind for _, kind in deltas[0]})
        raise AdapterError(
            f"`how={recipe.how!r}` combines changes of weights, and {', '.join(kinds)} makes no "
            "such change that it could take: use 'sum', or 'svd' where weights change at all."
        )
    result = {}
    for host, kind in deltas[0]:
        alike = [found[host, kind] for found in deltas]
        for name, tensor in _mixed(recipe, alike, kind).items():
            result[_Entry(host, kind, name)] = tensor
    return result


def _others(adapter: Adapter, how: str) -> dict[tuple[str, str], Delta]:
    """Return the deltas that are no changes of weights which `how` could take."""
    found = [(h, m.kind, d) for m in adapter.methods for h, d in adapter.deltas_of(m).items()]
    return {(host, kind): delta for host, kind, delta in found if not is_joinable(delta, how)}


def _mixed(recipe: Recipe, deltas: Sequence[Delta], kind: str) -> dict[str, Tensor]:
    """Return the combination of deltas of one kind at one host, tensor by tensor."""
    tensors = [dict(delta.named_parameters()) for delta in deltas]
    starts = _starts(deltas[0])
    _refuse_factors(deltas[0], starts, recipe.how, kind)
    _require_same_constants(deltas, kind)
    result = {}
    for name, first in tensors[0].items():
        if any(found[name].shape != first.shape for found in tensors):
            raise AdapterError(f"`{name}` of {kind} has another shape in some of the adapters.")
        start = starts[name]
        if start is None:
            _require_mean(recipe, kind)
            start = torch.zeros_like(first)
        result[name] = start + recipe.mixed([found[name] - start for found in tensors])
    return result


def _starts(delta: Delta) -> dict[str, Tensor | None]:
    """Return what `reset_parameters` makes of each parameter, None where that is not one thing."""
    twins = [copy.deepcopy(delta), copy.deepcopy(delta)]
    with torch.random.fork_rng():
        for seed, twin in enumerate(twins):
            torch.manual_seed(seed)
            for parameter in twin.parameters():
                parameter.fill_(math.nan)  # what is not reset has no known start
            twin.reset_parameters()
    first, second = (dict(twin.named_parameters()) for twin in twins)
    return {n: t.detach() if torch.equal(t, second[n]) else None for n, t in first.items()}


def _require_mean(recipe: Recipe, kind: str) -> None:
    if recipe.rule != "linear" or abs(sum(recipe.weights) - 1) > 1e-6:
        raise AdapterError(
            f"Parts of {kind} start at random, so that only a mean of them has a meaning: use "
            f"`how='sum'` and weights that add up to 1, but they are {recipe.how!r} and "
            f"{sum(recipe.weights):g}."
        )


def _refuse_factors(delta: Delta, starts: Mapping[str, Tensor | None], how: str, kind: str) -> None:
    """Refuse entries of factors, of which only the product means something."""
    drawn = isinstance(delta, WeightDelta) and any(start is None for start in starts.values())
    if isinstance(delta, Product) or drawn:
        able = "'sum' or 'svd'" if isinstance(delta, Product) and delta.additive else "'svd'"
        raise AdapterError(
            f"`how={how!r}` cannot combine the factors of {kind}, of which only the product has a "
            f"meaning: use {able}, which gives a LoRA."
        )


def _require_same_constants(deltas: Sequence[Delta], kind: str) -> None:
    first, *others = (dict(delta.named_buffers()) for delta in deltas)
    for name, tensor in first.items():
        if not all(torch.equal(tensor, other[name]) for other in others):
            raise AdapterError(f"`{name}` of {kind} is not the same in all the adapters.")


def _unlike(one: Adapter, other: Adapter, how: str) -> str:
    return (
        f"Adapters `{one.name}` and `{other.name}` have different methods or targets, which "
        f"`how={how!r}` cannot combine: {list(one.methods)} and {list(other.methods)}; "
        "`how='svd'` with a `rank` combines any changes of weights."
    )


def _kept(recipe: Recipe, chosen: str | None) -> list[Method]:
    """Return the methods of what is combined entry by entry, and those that only train in place."""
    kinds = {kind for _, kind in _others(recipe.adapters[0], recipe.how)}
    kept = [method for method in recipe.adapters[0].methods if method.kind in kinds]
    for adapter in recipe.adapters:
        if chosen in (None, adapter.name):
            kept += [m for m in adapter.methods if not adapter.deltas_of(m) and m not in kept]
    return kept


def _trained(recipe: Recipe, chosen: str | None) -> set[str]:
    adapters = [a for a in recipe.adapters if chosen in (None, a.name)]
    return {name for adapter in adapters for name in adapter.in_place}


def _in_place(recipe: Recipe, chosen: str | None) -> dict[str, Tensor]:
    """Return what the new adapter has in place of the base's own tensors."""
    if chosen is not None:
        _require_named(recipe, chosen)
    states = {a.name: _own(a) for a in recipe.adapters if chosen in (None, a.name)}
    if chosen is not None:
        return states[chosen]
    base = _base(recipe.adapters[0].model, {name for own in states.values() for name in own})
    return {name: _of_base(recipe, states, name, start) for name, start in base.items()}


def _of_base(
    recipe: Recipe, states: Mapping[str, Mapping[str, Tensor]], name: str, start: Tensor
) -> Tensor:
    pairs = zip(recipe.adapters, recipe.weights, strict=True)
    found = [(states[a.name][name], w) for a, w in pairs if name in states[a.name]]
    if not start.is_floating_point():  # a count of batches
        return found[0][0]
    wide = start.to(torch.promote_types(start.dtype, torch.float32))
    mixed = recipe.mixed([t.to(wide.dtype) - wide for t, _ in found], [w for _, w in found])
    return (wide + mixed).to(start.dtype)


def _own(adapter: Adapter) -> dict[str, Tensor]:
    state = adapter.state_dict()
    return {name: tensor for name, tensor in state.items() if SLOT not in name.split(".")}


def _base(model: nn.Module, names: set[str]) -> dict[str, Tensor]:
    """Return the base's own tensors, with all adapters off."""
    with ExitStack() as stack:
        for adapter in adapters_of(model).values():
            stack.enter_context(adapter.disabled())
        present: dict[str, Any] = model.state_dict(keep_vars=True)
        return {name: present[name].detach().clone() for name in sorted(names)}


def _require_named(recipe: Recipe, chosen: str) -> None:
    names = [adapter.name for adapter in recipe.adapters]
    if chosen not in names:
        raise AdapterError(
            f"`in_place` must be one of the adapters ({', '.join(names)}) or None, but is "
            f"{chosen!r} instead.{near_misses(chosen, names)}"
        )
