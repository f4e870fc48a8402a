"""Bottleneck adapters in the format of AdapterHub's library (adapters 1.3), both ways.

Its folders hold `adapter_config.json`, `adapter.safetensors`, and of a trained head
`model_head.safetensors`. Keys name a place in a layer of the architecture, in the names of
transformers 4.57; `_PLACES` says which. Its Pfeiffer default normalises before the adapter, over
weights of the base: what such a file computes no adapter of ours does, so it is refused.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapter import Adapter
from lightning_peft.delta import SLOT
from lightning_peft.errors import AdapterError, CheckpointError
from lightning_peft.files.folder_io import (
    ADAPTERHUB,
    THEIR_CONFIG,
    dump,
    pack,
    parse,
    read_json,
    write,
)
from lightning_peft.files.peft.settings import Settings
from lightning_peft.methods.bottleneck import Bottleneck, BottleneckAdapter
from lightning_peft.structure import anatomy
from lightning_peft.structure.anatomy import head_parameters
from lightning_peft.structure.sublayers import SubLayer, sublayers
from lightning_peft.structure.targets import exactly

TENSORS, HEAD, HEAD_CONFIG = ADAPTERHUB
CONFIG = THEIR_CONFIG
VERSION = "adapters.1.3.0"

_WITHIN = ("attention.output", "", "output")
_BESIDE = ("attention_adapters", "cross_attention_adapters", "output_adapters")
_PLACES: dict[str, tuple[str, str, str]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "deberta-v2"), _WITHIN),
    **dict.fromkeys(
        ("bart", "distilbert", "gpt2", "gptj", "llama", "mbart", "mistral", "whisper"), _BESIDE
    ),
    **dict.fromkeys(("mt5", "t5"), ("layer.0", "layer.1", "layer.{last}")),
    "vit": ("attention_adapters", "", "output.output_adapters"),
}
"""Where in a layer the library keeps adapters behind attention, cross-attention, feed-forward."""

_PARALLEL = ("bart", "bert", "deberta-v2", "distilbert", "electra", "roberta", "xlm-roberta")
"""Where a parallel adapter gets what ours gets; elsewhere the library gives it the stream before
the normalisation, and ours what the feed-forward receives."""

_LAYERS = {"vit": (r"(^|\.)layers\.(\d+)$", r"\1encoder.layer.\2")}
"""What has been renamed in transformers since."""

_NAMES = {
    "adapter_down.0.weight": "down",
    "adapter_down.0.bias": "down_bias",
    "adapter_up.weight": "up",
    "adapter_up.bias": "up_bias",
    "gate.weight": "gate",
    "gate.bias": "gate_bias",
    "scaling": "scale",
}
_ACTIVATIONS = {"swish": "silu", "silu": "silu", "leakyrelu": "leaky_relu", "linear": "identity"}
_ACTIVATIONS |= {name: name for name in ("relu", "gelu", "tanh", "sigmoid")}
_FIXED: dict[str, tuple[Any, str]] = {
    "original_ln_before": (False, "normalises by weights of the base before the adapter"),
    "original_ln_after": (True, "leaves out a normalisation of the base"),
    "ln_before": (False, "normalises in a way that its safetensors cannot hold"),
    "ln_after": (False, "normalises behind the adapter"),
    "inv_adapter": (None, "stands for an invertible adapter"),
    "phm_layer": (False, "stands for Compacter"),
}
_HARMLESS = (
    "adapter_residual_before_ln", "architecture", "factorized_phm_W", "factorized_phm_rule",
    "hypercomplex_nonlinearity", "init_weights", "init_weights_seed",
    "inv_adapter_reduction_factor", "learn_phm", "phm_bias", "phm_c_init", "phm_dim",
    "phm_init_range", "phm_rank", "reduction_factor", "shared_W_phm", "shared_phm_rule",
)  # fmt: skip
"""What changes nothing beside the settings above, or is read from the tensors."""


def is_here(folder: Path) -> bool:
    """Whether a folder is one of AdapterHub's, whose settings are below a key of their own."""
    present = (folder / TENSORS).exists() and (folder / CONFIG).exists()
    return present and "config" in read_json(folder / CONFIG)


@dataclass(frozen=True)
class Described:
    """What a folder holds, for a given base."""

    name: str
    """The adapter's name, as ours may be."""

    base: str
    """What the file says it was trained on."""

    method: BottleneckAdapter
    in_place: list[str]
    """The names of the head's parameters, if it is there."""

    hosts: dict[str, str]
    """The module that each place is behind."""

    tensors: Mapping[str, Tensor]
    head: Mapping[str, Tensor]

    def state(self, adapter: Adapter) -> dict[str, Tensor]:
        """Return the adapter's state.

        Raises:
            CheckpointError: a tensor is in a place, or has a name, that we do not know.
        """
        state = dict(self.head)
        for key, tensor in self.tensors.items():
            place, name = _split(key)
            if name not in _NAMES or place not in self.hosts:
                raise CheckpointError(f"`{key}` is unexpected in `{TENSORS}`.")
            host = self.hosts[place]
            state[f"{host}.{SLOT}.{adapter.name}_bottleneck.{_NAMES[name]}"] = tensor
        return state


def describe(folder: Path, model: nn.Module) -> Described:
    """Return the method in a folder, and its tensors.

    Raises:
        CheckpointError: what the file computes, or the architecture, is not ours.
    """
    whole = read_json(folder / CONFIG)
    settings = Settings(whole.get("config") or {}, str(folder / CONFIG))
    name = re.sub(r"[^\w-]", "-", str(whole.get("name") or "default"))
    tensors = _tensors(folder / TENSORS)
    head = _tensors(folder / HEAD) if (folder / HEAD).exists() else {}
    present = {_split(key)[0] for key in tensors}
    parallel = settings.take("is_parallel", False)
    places = {_bare(model, place): host for host, place in _places(model, parallel).items()}
    lost = sorted(place for place in present if _bare(model, place) not in places)
    if lost or not present:
        raise CheckpointError(
            f"`{folder / TENSORS}` has an adapter at `{lost[0] if lost else 'no place'}`, which "
            f"{type(model).__name__} does not have: load the model that it was trained in."
        )
    hosts = {place: places[_bare(model, place)] for place in present}
    _require_all(settings, model, set(hosts.values()), parallel)
    method = _method(settings, model, set(hosts.values()), _size(tensors, folder))
    heads = _trained(model, head, folder)
    base, trained = str(whole.get("model_name") or ""), {key: head[key] for key in heads}
    return Described(name, base, method, heads, hosts, tensors, trained)


def export_adapter(adapter: Adapter, folder: str | Path, part: str | None = None) -> Path:
    """Write the bottleneck adapters of `adapter` as AdapterHub's library does.

    Raises:
        AdapterError: the library cannot hold them; the message says why.
        CheckpointError: the folder cannot be written.
    """
    method = _bottleneck(adapter, part)
    deltas = adapter.deltas_of(method)
    places = _places(adapter.model, method.placement == "parallel")
    adapters = {host: delta for host, delta in deltas.items() if isinstance(delta, Bottleneck)}
    if odd := sorted(adapters.keys() - places.keys()):
        raise AdapterError(f"AdapterHub's library has no adapter behind `{odd[0]}`.")
    tensors = {
        f"{places[host]}.adapters.{adapter.name}.{theirs}": delta.get_parameter(ours).detach()
        for host, delta in adapters.items()
        for theirs, ours in _NAMES.items()
        if ours in dict(delta.named_parameters())
    }
    files: dict[str, bytes | None] = {
        TENSORS: pack(tensors),
        CONFIG: dump(_about(adapter) | {"config": _config(method, adapters, adapter.model)}),
    }
    write(Path(folder), files | _head_files(adapter))
    return Path(folder)


def _method(settings: Settings, model: nn.Module, hosts: set[str], size: int) -> BottleneckAdapter:
    for name, (value, reason) in _FIXED.items():
        if settings.any_of(name, bool, str, int) not in (value, None):
            raise settings.refusal(name, f"{reason}, which ours do not: it must be {value!r}")
    if settings.any_of("residual_before_ln", bool, str) not in (True, False, None):
        raise settings.refusal("residual_before_ln", "must be true or false")
    activation = settings.take("non_linearity", "relu")
    if activation not in _ACTIVATIONS:
        raise settings.refusal("non_linearity", f"must be one of {', '.join(_ACTIVATIONS)}")
    scaling = settings.any_of("scaling", float, int, str)
    if isinstance(scaling, str) and scaling != "learned":
        raise settings.refusal("scaling", "must be a number or 'learned'")
    parallel = settings.take("is_parallel", False)
    settings.ignore(*_HARMLESS)
    made: dict[str, Any] = {
        "size": size,
        "activation": _ACTIVATIONS[activation],
        "scaling": 1.0 if scaling is None else scaling,
        "dropout": settings.take("dropout", 0.0),
        "gating": "sequence" if settings.take("use_gating", False) else None,
        "layer_drop": settings.take("stochastic_depth", 0.0),
    }
    settings.finish()
    return BottleneckAdapter(**made, **_placement(model, hosts, parallel))


def _require_all(settings: Settings, model: Any, hosts: set[str], parallel: bool) -> None:
    """Refuse a file that lacks an adapter which its configuration states."""
    stated = [
        settings.take(name, False) for name in ("mh_adapter", "cross_adapter", "output_adapter")
    ]
    left_out = settings.take("leave_out", list[int]())
    if left_out and getattr(model.config, "is_encoder_decoder", False):
        return  # in which of the two stacks the library counts a layer depends on the architecture
    for index, (_, parts) in enumerate(_by_layer(model)):
        for number, part in enumerate(parts):
            host = part.exit[0] if parallel else part.output[0]
            wanted = stated[_which(part, number)] and index not in left_out
            if wanted and host not in hosts:
                raise CheckpointError(
                    f"`{settings.where}` says that an adapter is behind `{host}`, but it is "
                    f"missing in `{TENSORS}`."
                )


def _which(part: SubLayer, number: int) -> int:
    """Return 0 for self-attention, 1 for cross-attention, 2 for a feed-forward."""
    return 2 if not part.mixes else min(number, 1)


def _placement(model: nn.Module, hosts: set[str], parallel: bool) -> dict[str, Any]:
    """Return the placement that gives exactly these hosts, or their names."""
    if not parallel:
        for placement in ("pfeiffer", "houlsby"):
            found = [s for s in sublayers(model) if placement == "houlsby" or not s.mixes]
            if {s.output[0] for s in found} == hosts:
                return {"placement": placement}
        return {"targets": exactly(sorted(hosts))}
    if {s.exit[0] for s in sublayers(model) if not s.mixes} != hosts:
        raise CheckpointError("A parallel adapter must be at every feed-forward, but is not.")
    return {"placement": "parallel"}


def _places(model: Any, parallel: bool) -> dict[str, str]:
    """Return, by the name of a host, where the library keeps its adapter.

    Raises:
        AdapterError: the library names the places of this architecture otherwise, or gives the
            adapters something else.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in _PLACES:
        raise AdapterError(
            f"Where AdapterHub's library puts adapters is known for {', '.join(sorted(_PLACES))}, "
            f"but not for {kind or type(model).__name__}."
        )
    found: dict[str, str] = {}
    if parallel and kind not in _PARALLEL:
        raise AdapterError(
            f"In {type(model).__name__} a parallel adapter of AdapterHub's library receives what "
            "comes before the normalisation, and ours what the feed-forward receives."
        )
    for layer, parts in _by_layer(model):
        pattern, new = _LAYERS.get(kind, ("$^", ""))
        name = re.sub(pattern, new, layer)
        for number, part in enumerate(parts):
            inside = _PLACES[kind][_which(part, number)].format(last=len(parts) - 1)
            found[part.exit[0] if parallel else part.output[0]] = f"{name}.{inside}"
    return found


def _by_layer(model: nn.Module) -> Iterator[tuple[str, list[SubLayer]]]:
    every = sublayers(model)
    for index, (name, _) in enumerate(anatomy.layers(model)):
        yield name, [s for s in every if s.layer == index]


def _bare(model: Any, place: str) -> str:
    """Return a place without the name under which a model with a head keeps its base."""
    return place.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")


def _split(key: str) -> tuple[str, str]:
    """Return the place in a key, and the tensor's name there, without the adapter's own."""
    place, _, rest = key.partition(".adapters.")
    tensor = next((name for name in _NAMES if rest.endswith(f".{name}")), rest)
    return place, tensor


def _trained(model: nn.Module, head: Mapping[str, Tensor], folder: Path) -> list[str]:
    """Return what of a head's file is trained; the library writes a base's own head too."""
    own, heads = model.state_dict(), {*head_parameters(model)}
    for name in sorted(head.keys() - heads):
        if name not in own or not torch.equal(own[name].cpu(), head[name].to(own[name].dtype)):
            raise CheckpointError(
                f"`{name}` in `{folder / HEAD}` is not that of this base, and no part of its head."
            )
    return sorted(heads & head.keys())


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return parse(path.read_bytes(), path)
    except OSError as error:
        raise CheckpointError(f"`{path}` cannot be read: {error}.") from error


def _size(tensors: Mapping[str, Tensor], folder: Path) -> int:
    sizes = {len(t) for key, t in tensors.items() if key.endswith("adapter_down.0.weight")}
    if len(sizes) != 1:
        raise CheckpointError(
            f"The adapters in `{folder}` must be of one size, but are of {sorted(sizes)}."
        )
    return sizes.pop()


def _bottleneck(adapter: Adapter, part: str | None) -> BottleneckAdapter:
    found = [m for m in adapter.methods if isinstance(m, BottleneckAdapter)]
    if (
        len(found) != 1
        or part not in (None, "bottleneck")
        or (part is None and adapter.methods[1:])
    ):
        kinds = ", ".join(m.kind for m in adapter.methods)
        raise AdapterError(
            f"AdapterHub's format holds bottleneck adapters alone, and this adapter has {kinds}"
            f"{': export with part=' + repr('bottleneck') if found else ''}."
        )
    method = found[0]
    if method.layer_norm or method.gating == "token":
        name = "layer_norm" if method.layer_norm else "gating"
        raise AdapterError(
            f"AdapterHub's library cannot do `{name}={getattr(method, name)!r}` in this format."
        )
    return method


def _config(
    method: BottleneckAdapter, adapters: Mapping[str, Bottleneck], model: nn.Module
) -> dict[str, Any]:
    mixing = [[s.mixes and s.output[0] in adapters for s in parts] for _, parts in _by_layer(model)]
    behind = [
        any(not s.mixes and _host(s, method) in adapters for s in p) for _, p in _by_layer(model)
    ]
    size, width = next(iter(adapters.values())).down.shape
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items() if theirs != "silu"}
    return {
        "cross_adapter": any(any(layer[1:]) for layer in mixing),
        "dropout": method.dropout,
        "is_parallel": method.placement == "parallel",
        "leave_out": [i for i, there in enumerate(behind) if not there],
        "ln_after": False,
        "ln_before": False,
        "mh_adapter": any(any(layer[:1]) for layer in mixing),
        "non_linearity": names[method.activation],
        "original_ln_after": True,
        "original_ln_before": False,
        "output_adapter": any(behind),
        # The library divides and rounds down.
        "reduction_factor": width // size if not width % size else width / (size + 0.5),
        "residual_before_ln": True,
        "scaling": method.scaling,
        "stochastic_depth": method.layer_drop,
        "use_gating": method.gating is not None,
    }


def _host(part: SubLayer, method: BottleneckAdapter) -> str:
    return part.exit[0] if method.placement == "parallel" else part.output[0]


def _about(adapter: Adapter) -> dict[str, Any]:
    config: Any = getattr(adapter.model, "config", None)
    return {
        "hidden_size": getattr(config, "hidden_size", None),
        "model_class": type(adapter.model).__name__,
        "model_name": str(getattr(config, "name_or_path", "") or ""),
        "model_type": config.model_type,
        "name": adapter.name,
        "version": VERSION,
    }


def _head_files(adapter: Adapter) -> dict[str, bytes | None]:
    state = adapter.state_dict()
    head = {name: state[name] for name in adapter.in_place}
    if outside := sorted(head.keys() - {*head_parameters(adapter.model)}):
        raise AdapterError(
            f"AdapterHub's format has no place for `{outside[0]}`, trained in place."
        )
    if not head:
        return {}
    config: Any = adapter.model.config
    about = _about(adapter) | {"config": None, "name": None}
    about |= {"label2id": config.label2id, "num_labels": config.num_labels}
    return {HEAD: pack(head), HEAD_CONFIG: dump(about)}
