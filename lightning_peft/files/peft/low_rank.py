"""How peft spells products of two factors, which several of its methods share: names and shapes.

Of a linear layer and of a convolution `<host>.lora_A.weight`, of an embedding
`<host>.lora_embedding_A`. Of fused experts both factors are one matrix, A `(experts · r, in)` and B
`(out, r · experts)` with the experts innermost, and several weights of one host nest: all but the
last, in the order of the module, lie under further `.base_layer`. Of `nn.MultiheadAttention` peft
adapts input and output together, as `<host>.lora_A.weight` and
`<host>.base_layer.out_proj.lora_A.weight`; the change of the output it adds twice, in every mode
and when it merges, so B is written half as large and read twice as large.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.deltas.hosts import Parts
from lightning_peft.deltas.low_rank import Product, Site
from lightning_peft.deltas.sites import Table
from lightning_peft.files.peft import names
from lightning_peft.files.peft.settings import Settings
from lightning_peft.files.peft.spelling import (
    BASE,
    Entry,
    Inexpressible,
    Part,
    constant,
    require_shape,
    same,
)
from lightning_peft.structure import anatomy
from lightning_peft.structure.anatomy import is_conv1d

_OUTPUT = ".out_proj"
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
    prefix, module = part.key(host, ""), part.host(host)
    kind = getattr(getattr(part.model, "config", None), "model_type", "")
    if kind in _MAMBA and host.rpartition(".")[2] in ("out_proj", "conv1d"):
        raise Inexpressible(f"peft refuses to adapt `{host}` of a model of type {kind}.")
    if isinstance(delta, Product):
        yield Place(host, delta, prefix, host)
        return
    if not isinstance(delta, Parts):
        raise Inexpressible(f"peft has no counterpart of `{type(delta).__name__}`.")
    products: Any = dict(delta.named_children())
    for depth, (name, product) in enumerate(reversed(products.items())):
        path, parameter, attention = host, None, None
        if isinstance(module, nn.MultiheadAttention):
            if name != "in_proj_weight":
                raise Inexpressible(f"peft cannot adapt `{name}` of `{host}`.")
        elif anatomy.is_uncalled(module):
            attention = host.removesuffix(_OUTPUT)
            path = f"{attention}.base_layer{_OUTPUT}"
            if attention not in part.deltas:
                raise Inexpressible(f"peft adapts `{host}` only together with `{attention}`.")
        elif product.site.stack:
            path, parameter = host + ".base_layer" * depth, name
        yield Place(host, product, f"{prefix}{name}.", path, parameter, attention)


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
    return [_stacked_a(a, ours[0], shapes[0]), _stacked_b(b, ours[1], shapes[1])]


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


def adapted_hosts(settings: Settings, model: nn.Module) -> list[str]:
    """Return the modules that a configuration adapts, those with a parameter that it names too.

    Raises:
        CheckpointError: it adapts none.
    """
    wanted = settings.any_of("target_parameters", list) or []
    hosts = names.target_hosts(settings, model)
    modules = dict(model.named_modules())
    hosts += [h + _OUTPUT for h in hosts if isinstance(modules[h], nn.MultiheadAttention)]
    named = [n for n, _ in model.named_parameters() if wanted and _ends_with(n, wanted)]
    owners = dict.fromkeys(name.rpartition(".")[0] for name in named)
    if wanted and (not owners or owners.keys() & {*hosts}):
        raise settings.refusal(
            "target_parameters", "must name parameters of modules that are not adapted themselves"
        )
    return [*hosts, *owners]


def pattern_settings(
    settings: Settings, name: str, hosts: Sequence[str], default: Any
) -> Mapping[str, Any]:
    """Return a `rank_pattern` or an `alpha_pattern` in our patterns, without what fits no host."""
    patterns = settings.any_of(name, dict) or {}
    named = {host: _leader(host, hosts) for host in hosts}
    values = {host: names.matching(patterns, name, default) for host, name in named.items()}
    found = names.deviating(values, default)
    return {(p if "\\" not in p else f"re:{p}"): value for p, value in found.items()}


def _checked(entry: Entry, shape: Sequence[int]) -> Entry:
    def read(tensor: Tensor) -> Tensor:
        return require_shape(entry.theirs, tensor, shape)

    return Entry(entry.theirs, entry.ours, entry.write, read)


def _stacked_a(theirs: str, ours: str, shape: Sequence[int]) -> Entry:
    experts, r, into = shape

    def read(tensor: Tensor) -> Tensor:
        return require_shape(theirs, tensor, (experts * r, into)).reshape(shape)

    return Entry(theirs, ours, lambda state: state[ours].flatten(0, 1), read)


def _stacked_b(theirs: str, ours: str, shape: Sequence[int]) -> Entry:
    experts, out, r = shape

    def read(tensor: Tensor) -> Tensor:
        whole = require_shape(theirs, tensor, (out, r * experts))
        return whole.reshape(out, r, experts).permute(2, 0, 1)

    return Entry(theirs, ours, lambda state: state[ours].permute(1, 2, 0).flatten(1), read)


def _halved(theirs: str, ours: str, shape: Sequence[int]) -> Entry:
    def read(tensor: Tensor) -> Tensor:
        return require_shape(theirs, tensor, shape) * 2

    return Entry(theirs, ours, lambda state: state[ours] / 2, read)


def _silent(theirs: str, shape: Sequence[int]) -> Entry:
    # A product of nothing, but with an A that lets B learn.
    value = torch.eye(*shape) if theirs.endswith("lora_A.weight") else torch.zeros(tuple(shape))
    return constant(theirs, value.clone, "an output projection that is not adapted")


def _leader(host: str, hosts: Sequence[str]) -> str:
    """Return the host whose patterns are those of `host`: of an output, its attention."""
    attention = host.removesuffix(_OUTPUT)
    return attention if attention in hosts else host


def _ends(every: Sequence[str], chosen: set[str]) -> list[str]:
    found = names.shortest(every, chosen)
    if isinstance(found, str):
        raise Inexpressible("peft finds further parameters by the names of those that are adapted.")
    return found


def _ends_with(name: str, ends: Sequence[Any]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)
