"""LoRA and its kin that are trained otherwise and computed alike (LoRA+)."""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar, cast

from torch import nn

from lightning_peft.delta import plain_name
from lightning_peft.deltas.hosts import Parts
from lightning_peft.deltas.low_rank import LowRank
from lightning_peft.files.peft import names, trainable_tokens
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
from lightning_peft.files.peft.spelling import (
    BASE,
    Copies,
    Entry,
    Inexpressible,
    Part,
    Spelling,
    same,
)
from lightning_peft.files.peft.trainable_tokens import rows_of, tables
from lightning_peft.method import Method
from lightning_peft.methods.lora import LoRA
from lightning_peft.methods.trainable_tokens import TrainableTokens
from lightning_peft.structure.anatomy import is_transformers

_Value = TypeVar("_Value")

_BIAS = {"none": "none", "lora": "lora_only", "all": "all"}

_STARTS = (True, False, "gaussian", "eva", "orthogonal", "loftq")
"""Ways of peft's to start from; but for the last they leave the base as it is."""


class LowRankSpelling(Spelling):
    """Two trained factors."""

    peft_type = "LORA"
    companions = ("trainable_tokens",)

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
        config = lora_config(part, found, rslora) | {"bias": _BIAS[bias]}
        return config | {"trainable_token_indices": _token_indices(part)}

    def method(self, settings: Settings, keys: Sequence[str], model: nn.Module) -> Sequence[Method]:
        """Return LoRA with the settings, and trainable tokens if it has some."""
        hosts = adapted_hosts(settings, model)
        common = common_settings(settings, model, hosts)
        bias = {theirs: ours for ours, theirs in _BIAS.items()}.get(settings.take("bias", "none"))
        if bias is None:
            raise settings.refusal("bias", f"must be one of {', '.join(_BIAS.values())}")
        root = settings.take("use_rslora", False)
        patterns = pattern_settings(settings, hosts, common["r"], common["alpha"], root)
        lora = LoRA(**common, rslora=root, bias=bias, **patterns)  # type: ignore[arg-type]
        return [lora, *_tokens(settings, model)]

    def entries(self, part: Part) -> list[Entry]:
        """Return A and B of each product, and the biases that are trained with them."""
        factors = [entry for place in places(part) for entry in entries_of(place)]
        tokens = part.companion("trainable_tokens")
        rows = rows_of(tokens, "token_adapter.") if tokens else []
        return factors + unadapted(part) + _biases(part) + rows


def lora_config(part: Part, found: Sequence[Place], rslora: bool = False) -> dict[str, Any]:
    """Return the settings that all of LoRA's family have, given its products.

    Ranks and strengths are those that the products have, whatever pattern gave them.
    """
    ranks = {place.host: rank(place) for place in found}
    alphas = {p.host: _alpha(p.product.scale, ranks[p.host], rslora) for p in found}
    for host, attention in [(p.host, p.attention) for p in found if p.attention is not None]:
        if (ranks.pop(host), alphas.pop(host)) != (ranks[attention], alphas[attention]):
            raise Inexpressible(f"peft has one rank and strength for `{attention}` and `{host}`.")
    r, alpha = _most_common(ranks), _most_common(alphas)
    # peft refuses dropout where a weight is read, and we have none there either.
    read = any(isinstance(delta, Parts) for delta in part.deltas.values())
    dropout = 0.0 if read else max(place.product.dropout for place in found)
    return targets_of(part, found) | {
        "alpha_pattern": names.deviating(alphas, alpha),
        "bias": "none",
        "ensure_weight_tying": False,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_bias": False,
        "lora_dropout": dropout,
        "r": r,
        "rank_pattern": names.deviating(ranks, r),
        "trainable_token_indices": None,
        "use_dora": False,
        "use_rslora": rslora,
    }


def common_settings(settings: Settings, model: nn.Module, hosts: Collection[str]) -> dict[str, Any]:
    """Take what all of LoRA's family read, and return it as our settings.

    Raises:
        CheckpointError: a setting cannot be honoured.
    """
    settings.any_of("init_lora_weights", bool, str)
    settings.ignore("fan_in_fan_out", "qalora_group_size", "loftq_config")
    if settings.take("ensure_weight_tying", False):
        raise settings.refusal(
            "ensure_weight_tying", "trains tied modules as one, which ours do not: it must be off"
        )
    settings.ignore("eva_config", "corda_config", "lora_ga_config")  # of the start alone
    return {
        "r": settings.take("r", 8),
        "alpha": settings.take("lora_alpha", 8.0),
        "dropout": settings.take("lora_dropout", 0.0),
        "targets": names.as_targets(model, hosts),
    }


def _token_indices(part: Part) -> dict[str, list[int]] | None:
    tokens = part.companion("trainable_tokens")
    if tokens is None:
        return None
    ids = cast(TrainableTokens, tokens.method).token_ids
    if ids is None:
        raise Inexpressible("peft trains a whole table as one of `modules_to_save`.")
    return {table: list(ids) for table in tables(tokens)}


def _tokens(settings: Settings, model: nn.Module) -> list[TrainableTokens]:
    """Return the trainable tokens that a configuration has beside LoRA; of one table, or alike."""
    name = "trainable_token_indices"
    given = settings.any_of(name, list, dict)
    if not given:
        return []
    by_table = given if isinstance(given, dict) else {_word_embedding(model): given}
    first = next(iter(by_table.values()))
    if any(ids != first for ids in by_table.values()):
        raise settings.refusal(name, "must list the same ids for each table")
    hosts = [n for n in names.module_names(model) if names.meant([*by_table], n, loose=True)]
    if not hosts:
        raise settings.refusal(name, "must name tables of the model")
    return [trainable_tokens.tokens(settings, name, first, hosts, model)]


def _word_embedding(model: nn.Module) -> str:
    """Return the name of the table that peft takes where none is named."""
    if not is_transformers(model):
        return "embed_tokens"
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    return next(name for name, module in model.named_modules() if module is table)


def _most_common(values: Mapping[str, _Value]) -> _Value:
    return Counter(values.values()).most_common(1)[0][0]


def plain_settings(settings: Settings, model: nn.Module, hosts: Collection[str]) -> dict[str, Any]:
    """Return `common_settings` for a method that scales by alpha / r alone.

    Raises:
        CheckpointError: a setting cannot be honoured.
    """
    common = common_settings(settings, model, hosts)
    root = settings.take("use_rslora", False)
    return common | ({"alpha": common["alpha"] * math.sqrt(common["r"])} if root else {})


def _alpha(scale: float, r: int, rslora: bool) -> float:
    alpha = float(f"{scale * (math.sqrt(r) if rslora else r):.12g}")
    return int(alpha) if alpha.is_integer() else alpha


def _biases(part: Part) -> list[Entry]:
    named = {plain_name(n): p for n, p in part.model.named_parameters(remove_duplicate=False)}
    found = []
    for name in part.method.in_place(part.model):
        tied = [n for n, p in named.items() if p is named[name] and n != name]
        if odd := [n for n in (name, *tied) if n.rpartition(".")[2] != "bias"]:
            raise Inexpressible(f"peft does not train `{odd[0]}` as a bias.")
        copies = Copies(same(_bias_key(part, name), name))
        found += [copies.entry, *(copies.further(_bias_key(part, n), optional=True) for n in tied)]
    return found


def _bias_key(part: Part, name: str) -> str:
    owner = name.rpartition(".")[0]
    return f"{BASE}{owner}{'.base_layer' if owner in part.deltas else ''}.bias"


SPELLING = LowRankSpelling()
