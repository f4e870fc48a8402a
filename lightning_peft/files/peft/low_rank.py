"""How peft spells products of two factors, which several of its methods share: names and shapes.

Of a linear layer and of a convolution `<host>.lora_A.weight`, of an embedding
`<host>.lora_embedding_A`. Of fused experts both factors are one matrix, A `(experts · r, in)` and B
`(out, r · experts)` with the experts innermost, and several weights of one host nest: all but the
last, in the order of the module, lie under further `.base_layer`. Of `nn.MultiheadAttention` peft
adapts input and output together, as `<host>.lora_A.weight` and
`<host>.base_layer.out_proj.lora_A.weight`; the change of the output it adds twice, in every mode
and when it merges, so B is written half as large and read twice as large.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.deltas.hosts import Parts
from lightning_peft.deltas.low_rank import Product, Site, check_rank
from lightning_peft.deltas.sites import Table
from lightning_peft.errors import AdapterError
from lightning_peft.files.peft import names
from lightning_peft.files.peft.settings import Settings
from lightning_peft.files.peft.spelling import (
    BASE,
    Entry,
    Inexpressible,
    Part,
    State,
    constant,
    require_shape,
    same,
)
from lightning_peft.structure import anatomy
from lightning_peft.structure.anatomy import is_conv1d

_OUTPUT = ".out_proj"
_FUSED = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}
_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")


@dataclass(frozen=True)
class Place:
    """One product, and how both sides call it."""

    host: str
    product: Product
    ours: str
    """What precedes the names of its tensors on our side, with the dot."""

    path: str
    """The name of the module on peft's side."""

    parameter: str | None = None
    """The host's parameter, where peft knows it by that (`target_parameters`)."""

    attention: str | None = None
    """The `nn.MultiheadAttention` whose output projection it is."""

    def theirs(self, tensor: str) -> str:
        """Return peft's key of `lora_A` or `lora_B`."""
        if isinstance(self.product.site, Table):
            return f"{BASE}{self.path}.{tensor.replace('lora_', 'lora_embedding_')}"
        return f"{BASE}{self.path}.{tensor}.weight"


def places(part: Part) -> list[Place]:
    """Return the products of a method.

    Raises:
        Inexpressible: peft cannot adapt one of the hosts.
    """
    return [place for host, delta in part.deltas.items() for place in _places(part, host, delta)]


def _places(part: Part, host: str, delta: Any) -> Iterator[Place]:
    _refuse_taken(part, host, delta)
    prefix, module = part.key(host, ""), part.host(host)
    if isinstance(delta, Product):
        yield Place(host, delta, prefix, host)
        return
    products: Any = dict(delta.named_children())
    for depth, (name, product) in enumerate(reversed(products.items())):
        ours = f"{prefix}{name}."
        if isinstance(module, nn.MultiheadAttention) and name != "in_proj_weight":
            raise Inexpressible(f"peft cannot adapt `{name}` of `{host}`.")
        if anatomy.is_uncalled(module):
            yield _output_place(part, host, product, ours)
        elif product.site.stack:
            yield Place(host, product, ours, host + ".base_layer" * depth, name)
        else:
            yield Place(host, product, ours, host)


def _output_place(part: Part, host: str, product: Product, ours: str) -> Place:
    attention = host.removesuffix(_OUTPUT)
    if attention not in part.deltas:
        raise Inexpressible(f"peft adapts `{host}` only together with `{attention}`.")
    path = f"{attention}.base_layer{_OUTPUT}"
    return Place(host, product, ours, path, attention=attention)


def _refuse_taken(part: Part, host: str, delta: Any) -> None:
    """Refuse a host that peft would not adapt, or not this one by its name."""
    kind = str(getattr(getattr(part.model, "config", None), "model_type", ""))
    leaf, module = host.rpartition(".")[2], part.host(host)
    if not isinstance(delta, Product | Parts):
        raise Inexpressible(f"peft has no counterpart of `{type(delta).__name__}`.")
    if kind in _MAMBA and leaf in ("out_proj", "conv1d"):
        raise Inexpressible(f"peft refuses to adapt `{host}` of a model of type {kind}.")
    if isinstance(module, nn.Linear) and leaf in _fused_away(kind):
        raise Inexpressible(
            f"peft takes the name of `{host}` for one that models of type {kind} had for experts."
        )
    if anatomy.read_weights(module) == ["weight"] and not anatomy.is_uncalled(module):
        raise Inexpressible(f"`{host}` is a layer of its own kind, which peft cannot adapt.")


def entries_of(place: Place) -> list[Entry]:
    """Return the entries of A and B of one product, as they are trained."""
    product: Any = place.product
    a, b = place.theirs("lora_A"), place.theirs("lora_B")
    ours = place.ours + "lora_A", place.ours + "lora_B"
    shapes = [tuple(factor.shape) for factor in (product.lora_A, product.lora_B)]
    if place.attention is not None:
        return [_checked(same(a, ours[0]), shapes[0]), _halved(b, ours[1], shapes[1])]
    if not place.product.site.stack:
        return [_checked(same(a, ours[0]), shapes[0]), _checked(same(b, ours[1]), shapes[1])]
    return _stacked((a, b), ours, shapes)


def as_peft(site: Site, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return both factors in peft's shapes."""
    if not site.stack:
        return a, b
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def unadapted(part: Part) -> list[Entry]:
    """Return the output projections that peft adapts with `nn.MultiheadAttention`: by nothing."""
    found = []
    for place in places(part):
        attention = part.host(place.host)
        whole = f"{place.host}{_OUTPUT}" in part.deltas
        if isinstance(attention, nn.MultiheadAttention) and not whole:
            site = Site(tuple(attention.out_proj.weight.shape))
            for name, shape in zip(("lora_A", "lora_B"), site.shapes(rank(place)), strict=True):
                key = f"{BASE}{place.path}.base_layer.out_proj.{name}.weight"
                found.append(_silent(key, shape))
    return found


def rank(place: Place) -> int:
    """Return the rank of a product."""
    return int(place.product.factors()[0].shape[place.product.site.rank_dims[0]])


def targets_of(part: Part, found: Sequence[Place]) -> dict[str, Any]:
    """Return the settings that name the hosts, and the kind of their weights."""
    names_of = names.module_names(part.model)
    modules = {p.host for p in found if p.parameter is None and p.attention is None}
    parameters = {f"{p.host}.{p.parameter}" for p in found if p.parameter is not None}
    every = [n for n, _ in part.model.named_parameters()]
    return {
        "exclude_modules": None,
        "fan_in_fan_out": any(is_conv1d(part.host(host)) for host in modules),
        "layers_pattern": None,
        "layers_to_transform": None,
        "target_modules": names.shortest(names_of, modules) if modules else [],
        "target_parameters": _ends(every, parameters) if parameters else None,
    }


def adapted_hosts(settings: Settings, model: nn.Module) -> dict[str, list[str]]:
    """Return the modules that a configuration adapts, and the names by which its patterns see each.

    Those are the module's own; of an output projection that of its attention; of a module with
    parameters that the configuration names, those of the parameters.

    Raises:
        CheckpointError: it adapts none.
    """
    wanted = settings.any_of("target_parameters", list) or []
    found, modules = {}, dict(model.named_modules())
    for host in names.target_hosts(settings, model):
        found[host] = [host]
        if isinstance(modules[host], nn.MultiheadAttention):
            found[host + _OUTPUT] = [host]
    owners: dict[str, list[str]] = {}
    for name, _ in model.named_parameters() if wanted else ():
        if _ends_with(name, wanted):
            owners.setdefault(name.rpartition(".")[0], []).append(name)
    if wanted and (not owners or owners.keys() & found.keys()):
        raise settings.refusal(
            "target_parameters", "must name parameters of modules that are not adapted themselves"
        )
    return found | owners


def pattern_settings(
    settings: Settings, hosts: Mapping[str, Sequence[str]], r: int, alpha: float, root: bool
) -> dict[str, Mapping[str, Any]]:
    """Return `rank_pattern` and `alpha_pattern` as ours.

    Of a host with several parameters we have one rank, the largest; `entries_of` fills up others.

    Raises:
        CheckpointError: parameters of one host are changed with different strengths.
    """
    kinds: dict[str, type] = {"rank_pattern": int, "alpha_pattern": float}
    given = {name: _numbers(settings, name, kind) for name, kind in kinds.items()}
    for rank in (r, *given["rank_pattern"].values()):
        check_rank(rank)
    ranks, alphas = {}, {}
    for host, seen in hosts.items():
        by_name = {
            n: (
                names.matching(given["rank_pattern"], n, r),
                names.matching(given["alpha_pattern"], n, alpha),
            )
            for n in seen
        }
        ranks[host], alphas[host] = max(by_name.values())
        if len({a / (k**0.5 if root else k) for k, a in by_name.values()}) > 1:
            raise settings.refusal(
                "alpha_pattern", f"must give the parameters of `{host}` one strength"
            )
    return {"rank_pattern": _as_ours(ranks, r), "alpha_pattern": _as_ours(alphas, alpha)}


def _numbers(settings: Settings, name: str, kind: type) -> dict[str, Any]:
    found = settings.any_of(name, dict) or {}
    if any(isinstance(n, bool) or not isinstance(n, (int, kind)) for n in found.values()):
        whole = " whole" if kind is int else ""
        raise settings.refusal(name, f"must give{whole} numbers by pattern")
    if not all(abs(n) < math.inf for n in found.values()):
        raise settings.refusal(name, "must give finite numbers")
    return found


def _as_ours(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    found = names.deviating(values, default)
    return {(p if "\\" not in p else f"re:{p}"): value for p, value in found.items()}


def _fused_away(kind: str) -> tuple[str, ...]:
    """Return the names that peft takes for those of experts before they were fused.

    It does so for the types of models of which transformers knows such a time.
    """
    from transformers import conversion_mapping

    known = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {}) | {"mixtral": "mixtral"}
    return _FUSED.get(known.get(kind, ""), ())


def _checked(entry: Entry, shape: Sequence[int]) -> Entry:
    def read(tensor: Tensor) -> Tensor:
        return require_shape(entry.theirs, tensor, shape)

    return Entry(entry.theirs, entry.ours, entry.write, read)


def _stacked(keys: tuple[str, str], ours: tuple[str, str], shapes: Any) -> list[Entry]:
    """Return the entries of A and B of experts; a lower rank is filled up with zeros."""
    (experts, r, into), (_, out, _) = shapes
    kept: list[int] = []

    def rank_in(key: str, length: int, fits: bool, shape: Any) -> int:
        kept.append(length // experts)
        if not fits or length % experts or not 0 < kept[0] <= r or kept[0] != kept[-1]:
            raise AdapterError(
                f"`{key}` must have the shape of {experts} experts and a rank up to {r}, but has "
                f"{tuple(shape)} instead."
            )
        return kept[-1]

    def read_a(tensor: Tensor) -> Tensor:
        fits = tensor.dim() == 2 and tensor.shape[1] == into
        k = rank_in(keys[0], len(tensor), fits, tensor.shape)
        return F.pad(tensor.reshape(experts, k, into), (0, 0, 0, r - k))

    def read_b(tensor: Tensor) -> Tensor:
        fits = tensor.dim() == 2 and len(tensor) == out
        k = rank_in(keys[1], tensor.shape[-1], fits, tensor.shape)
        return F.pad(tensor.reshape(out, k, experts).permute(2, 0, 1), (0, r - k))

    def write_b(state: State) -> Tensor:
        return state[ours[1]].permute(1, 2, 0).flatten(1)

    a = Entry(keys[0], ours[0], lambda state: state[ours[0]].flatten(0, 1), read_a)
    return [a, Entry(keys[1], ours[1], write_b, read_b)]


def _halved(theirs: str, ours: str, shape: Sequence[int]) -> Entry:
    def read(tensor: Tensor) -> Tensor:
        return require_shape(theirs, tensor, shape) * 2

    return Entry(theirs, ours, lambda state: state[ours] / 2, read)


def _silent(theirs: str, shape: Sequence[int]) -> Entry:
    # A product of nothing, but with an A that lets B learn.
    value = torch.eye(*shape) if theirs.endswith("lora_A.weight") else torch.zeros(tuple(shape))
    return constant(theirs, value.clone, "an output projection that is not adapted")


def _ends(every: Sequence[str], chosen: set[str]) -> list[str]:
    found = names.shortest(every, chosen)
    if isinstance(found, str):
        raise Inexpressible("peft finds further parameters by the names of those that are adapted.")
    return found


def _ends_with(name: str, ends: Sequence[Any]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)
