"""Several adapters' changes of the same weights, made into one product for each weight."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_peft.adapter import Adapter
from lightning_peft.carrying.registry import modules_of
from lightning_peft.delta import Delta
from lightning_peft.deltas.hosts import Parts
from lightning_peft.deltas.low_rank import LowRank, Product, Site
from lightning_peft.deltas.sites import Kernel
from lightning_peft.deltas.weight_delta import WeightDelta
from lightning_peft.errors import AdapterError
from lightning_peft.methods.lora import LoRA
from lightning_peft.ops.combine import split, truncated
from lightning_peft.structure.targets import exactly

if TYPE_CHECKING:
    from lightning_peft.merging.combining import Recipe

Factors = tuple[Tensor, Tensor]


class Joint(NamedTuple):
    """What becomes of the changes of one weight: A and B, as their site keeps them."""

    a: Tensor
    b: Tensor
    r: int


Joined = dict[str, dict[str, Joint]]
"""By the names of the host and of its parameter."""

_CALLED = "weight"


@dataclass(frozen=True)
class Change:
    """One adapter's change of one weight."""

    adapter: str
    by: float
    delta: Any
    """A `Product` or a `WeightDelta`."""
    weight: Tensor

    @property
    def site(self) -> Site:
        """Where it acts."""
        return cast(Site, self.delta.site)

    def factors(self) -> Factors:
        """Return A and B; the change is s times their product."""
        return cast(Factors, self.delta.factors())

    def entries(self) -> Tensor:
        """Return ΔW, `(..., out, in)`, in full precision."""
        site, delta = self.site, self.delta
        if isinstance(delta, Product) and delta.additive:
            a, b = (site.flat(factor) for factor in self.factors())
            return delta.scale * (b @ a)
        if not self.weight.is_floating_point():
            raise AdapterError(
                f"What adapter `{self.adapter}` changes is defined by a weight that is quantised, "
                "so its change cannot be told: load the base without quantisation."
            )
        wide = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        if isinstance(delta, Product):
            return site.matrix(delta.changed(wide)) - site.matrix(wide)
        return cast(Tensor, delta.change(delta.matrix(wide))).view(site.matrix_shape)


def is_joinable(delta: Delta, how: str) -> bool:
    """Whether a way to combine takes the delta as a change of weights, to become a LoRA."""
    leaves = [leaf for _, leaf in _leaves(delta)]
    if how.endswith("svd"):
        return all(isinstance(d, Product | WeightDelta) and not d.merges_shared for d in leaves)
    if how in ("sum", "cat"):
        return all(isinstance(d, Product) and d.additive for d in leaves)
    return all(isinstance(d, LowRank) for d in leaves)


def joined(recipe: "Recipe") -> Joined:
    """Return the factors of what a recipe makes of all changes of weights.

    Raises:
        AdapterError: they cannot be combined in this way.
    """
    result: Joined = {}
    make = _maker(recipe.how)
    for (host, name), changes in _changes(recipe).items():
        a, b = make(changes, recipe)
        r = a.shape[changes[0].site.rank_dims[0]]
        result.setdefault(host, {})[name] = Joint(a, b, r)
    return result


def lora_for(factors: Joined) -> LoRA:
    """Return the LoRA that has these factors, with the scale 1."""
    ranks = {host: max(joint.r for joint in found.values()) for host, found in factors.items()}
    r = Counter(ranks.values()).most_common(1)[0][0]
    others = {p: n for p, n in zip(exactly(ranks), ranks.values(), strict=True) if n != r}
    hosts = None if list(ranks) == [""] else exactly(ranks)
    return LoRA(r=r, alpha=r, targets=hosts, rank_pattern=others, alpha_pattern=dict(others))


def write_factors(adapter: Adapter, factors: Joined) -> None:
    """Copy factors into the LoRA of an adapter; where its rank is higher the rest is zero.

    Raises:
        AdapterError: the LoRA is elsewhere than the factors, or its rank is too low for them.
    """
    lora = next((method for method in adapter.methods if isinstance(method, LoRA)), None)
    deltas = adapter.deltas_of(lora) if lora and factors else {}
    leaves = {host: dict(_leaves(delta)) for host, delta in deltas.items()}
    _require_same_places(leaves, factors)
    for host, found in leaves.items():
        for name, leaf in found.items():
            joint, own = factors[host][name], cast(Product, leaf).factors()
            for target, new in zip(own, (joint.a, joint.b), strict=True):
                target.copy_(_padded(new, target.shape))


def _require_same_places(
    leaves: Mapping[str, Mapping[str, Delta]], factors: Mapping[str, Mapping[str, Joint]]
) -> None:
    own, wanted = ({(h, n) for h, found in at.items() for n in found} for at in (leaves, factors))
    if own != wanted:
        host, name = min(own ^ wanted)
        raise AdapterError(
            f"The combination cannot be a LoRA of the same weights: `{name}` of `{host}` is in "
            f"{'it' if (host, name) in own else 'the adapters'} alone."
        )


def _leaves(delta: Delta) -> list[tuple[str, Delta]]:
    if isinstance(delta, Parts):
        return [(name, cast(Delta, part)) for name, part in delta.named_children()]
    return [(_CALLED, delta)]


def _changes(recipe: "Recipe") -> dict[tuple[str, str], list[Change]]:
    found: dict[tuple[str, str], list[Change]] = {}
    for adapter, by in zip(recipe.adapters, recipe.weights, strict=True):
        for host, module, delta in adapter.deltas:
            for name, leaf in _leaves(delta) if is_joinable(delta, recipe.how) else ():
                weight = cast(Tensor, module._parameters[name])
                change = Change(adapter.name, by, leaf, weight)
                found.setdefault((host, name), []).append(change)
    order = {name: i for i, name in enumerate(modules_of(recipe.adapters[0].model))}
    return dict(sorted(found.items(), key=lambda item: order[item[0][0]]))


def _maker(how: str) -> Callable[[Sequence[Change], "Recipe"], Factors]:
    if how in ("sum", "cat"):
        return _stacked
    if how == "svd":
        return _nearest
    return _of_entries if how.endswith("_svd") else _factor_by_factor


def _stacked(changes: Sequence[Change], recipe: "Recipe") -> Factors:
    site = changes[0].site
    _refuse_groups(site)
    rows, columns = site.rank_dims
    pairs = [change.factors() for change in changes]
    scaled = [c.by * c.delta.scale * a for c, (a, _) in zip(changes, pairs, strict=True)]
    return torch.cat(scaled, rows), torch.cat([b for _, b in pairs], columns)


def _nearest(changes: Sequence[Change], recipe: "Recipe") -> Factors:
    if not all(isinstance(c.delta, Product) and c.delta.additive for c in changes):
        return _of_entries(changes, recipe)
    site, rank = changes[0].site, recipe.rank or max(_rank(c) for c in changes)
    a, b = (site.flat(factor) for factor in _stacked(changes, recipe))
    return _as_kept(site, truncated(a, b, rank))


def _of_entries(changes: Sequence[Change], recipe: "Recipe") -> Factors:
    site = changes[0].site
    _refuse_groups(site)
    matrix = recipe.mixed([c.entries() for c in changes], [c.by for c in changes])
    return _as_kept(site, split(matrix, recipe.rank or _largest_rank(changes)))


def _factor_by_factor(changes: Sequence[Change], recipe: "Recipe") -> Factors:
    ranks = {change.adapter: _rank(change) for change in changes}
    if len(set(ranks.values())) > 1:
        raise AdapterError(
            f"`how={recipe.how!r}` combines factors of one rank, but the ranks are {ranks}: use "
            f"`how={_with_entries(recipe.how)!r}` or 'sum'."
        )
    strengths = [change.by * change.delta.scale for change in changes]
    roots = [math.sqrt(abs(strength)) for strength in strengths]
    # The sign goes to one side: on both it would cancel.
    signed = [math.copysign(root, s) for root, s in zip(roots, strengths, strict=True)]
    pairs = [change.factors() for change in changes]
    return (
        recipe.mixed([a for a, _ in pairs], signed),
        recipe.mixed([b for _, b in pairs], roots),
    )


def _as_kept(site: Site, factors: Factors) -> Factors:
    r = factors[0].shape[-2]
    a, b = (f.reshape(shape) for f, shape in zip(factors, site.shapes(r), strict=True))
    return a, b


def _rank(change: Change) -> int:
    return change.factors()[0].shape[change.site.rank_dims[0]]


def _largest_rank(changes: Sequence[Change]) -> int:
    ranks = [_rank(c) for c in changes if isinstance(c.delta, Product)]
    if not ranks:
        raise AdapterError(
            "`rank` must be given where no adapter has one of its own: it is that of the result."
        )
    return max(ranks)


def _with_entries(how: str) -> str:
    return "svd" if how == "linear" else f"{how}_svd"


def _padded(factor: Tensor, shape: Sequence[int]) -> Tensor:
    missing = [own - had for own, had in zip(shape, factor.shape, strict=True)]
    if min(missing) < 0:
        raise AdapterError(
            f"A factor of shape {tuple(factor.shape)} does not fit into one of {tuple(shape)}."
        )
    return F.pad(factor, [n for size in reversed(missing) for n in (0, size)])


def _refuse_groups(site: Site) -> None:
    if isinstance(site, Kernel) and site.groups > 1:
        raise AdapterError(
            f"A convolution in {site.groups} groups has no single product of factors: use "
            "`how='linear'`, or leave it out of the adapters."
        )
