"""LoRA and its kin that are trained otherwise and computed alike (LoRA+)."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from lightning_peft.deltas.low_rank import LowRank
from lightning_peft.files.peft import names
from lightning_peft.files.peft.low_rank import (
    Place,
    adapted_hosts,
    entries_of,
    pattern_settings,
    places,
    rank,
    targets_of,
    unadapted,
)
from lightning_peft.files.peft.settings import Settings
from lightning_peft.files.peft.spelling import BASE, Entry, Part, Spelling, same
from lightning_peft.method import Method
from lightning_peft.methods.lora import LoRA

_Value = TypeVar("_Value")

_BIAS = {"none": "none", "lora": "lora_only", "all": "all"}

_STARTS = (True, False, "gaussian", "eva", "orthogonal", "loftq")
"""Ways of peft's to start from; but for the last they leave the base as it is."""


class LowRankSpelling(Spelling):
    """Two trained factors."""

    peft_type = "LORA"

    def writes(self, part: Part) -> bool:
        """Whether the method's deltas are plain products."""
        products = [m for d in part.deltas.values() for m in d.modules() if hasattr(m, "factors")]
        return bool(products) and all(type(product) is LowRank for product in products)

    def reads(self, settings: Settings) -> bool:
        """Whether the configuration has no variant."""
        start = settings.peek("init_lora_weights")
        return not settings.take("use_dora", False) and (start is None or start in _STARTS[:-1])

    def config(self, part: Part) -> dict[str, Any]:
        """Return the settings of the method as peft spells them."""
        method, found = part.method, places(part)
        rslora = isinstance(method, LoRA) and method.rslora
        bias = method.bias if isinstance(method, LoRA) else "none"
        return lora_config(part, found, rslora) | {"bias": _BIAS[bias]}

    def method(self, settings: Settings, keys: Sequence[str], model: nn.Module) -> Method:
        """Return LoRA with the settings."""
        hosts = adapted_hosts(settings, model)
        common = common_settings(settings, model, hosts)
        bias = {theirs: ours for ours, theirs in _BIAS.items()}.get(settings.take("bias", "none"))
        if bias is None:
            raise settings.refusal("bias", f"must be one of {', '.join(_BIAS.values())}")
        return LoRA(
            **common,
            rslora=settings.take("use_rslora", False),
            bias=bias,  # type: ignore[arg-type]
            rank_pattern=pattern_settings(settings, "rank_pattern", hosts, common["r"]),
            alpha_pattern=pattern_settings(settings, "alpha_pattern", hosts, common["alpha"]),
        )

    def entries(self, part: Part) -> list[Entry]:
        """Return A and B of each product, and the biases that are trained with them."""
        factors = [entry for place in places(part) for entry in entries_of(place)]
        return factors + unadapted(part) + _biases(part)


def lora_config(part: Part, found: Sequence[Place], rslora: bool = False) -> dict[str, Any]:
    """Return the settings that all of LoRA's family have, given its products.

    Ranks and strengths are those that the products have, whatever pattern gave them.
    """
    ranks = {place.host: rank(place) for place in found}
    alphas = {p.host: _alpha(p.product.scale, ranks[p.host], rslora) for p in found}
    r, alpha = _most_common(ranks), _most_common(alphas)
    dropouts = {p.product.dropout.p for p in found if p.product.dropout is not None}
    return targets_of(part, found) | {
        "alpha_pattern": names.deviating(alphas, alpha),
        "bias": "none",
        "ensure_weight_tying": False,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_bias": False,
        "lora_dropout": max(dropouts, default=0.0),
        "r": r,
        "rank_pattern": names.deviating(ranks, r),
        "trainable_token_indices": None,
        "use_dora": False,
        "use_rslora": rslora,
    }


def common_settings(settings: Settings, model: nn.Module, hosts: Sequence[str]) -> dict[str, Any]:
    """Take what all of LoRA's family read, and return it as our settings.

    Raises:
        CheckpointError: a setting cannot be honoured.
    """
    settings.any_of("init_lora_weights", bool, str)
    settings.ignore("fan_in_fan_out", "qalora_group_size", "ensure_weight_tying", "loftq_config")
    settings.ignore("eva_config", "corda_config", "lora_ga_config")  # of the start alone
    return {
        "r": settings.take("r", 8),
        "alpha": settings.take("lora_alpha", 8.0),
        "dropout": settings.take("lora_dropout", 0.0),
        "targets": names.as_targets(model, hosts),
    }


def _most_common(values: Mapping[str, _Value]) -> _Value:
    return Counter(values.values()).most_common(1)[0][0]


def _alpha(scale: float, r: int, rslora: bool) -> float:
    alpha = float(f"{scale * (math.sqrt(r) if rslora else r):.12g}")
    return int(alpha) if alpha.is_integer() else alpha


def _biases(part: Part) -> list[Entry]:
    hosts = part.deltas
    found = []
    for name in part.method.in_place(part.model):
        owner, _, leaf = name.rpartition(".")
        inner = ".base_layer" if owner in hosts else ""
        found.append(same(f"{BASE}{owner}{inner}.{leaf}", name))
    return found


SPELLING = LowRankSpelling()
