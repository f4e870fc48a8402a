"""Any configuration of transformers, made tiny by the names of its settings.

No model is named here. A setting whose name says what it counts (layers, heads, experts, ids) gets
a small value of the kind that its default has; lists with one entry per layer keep one entry of
each kind, so that a hybrid model keeps both kinds of its layers; configurations inside are shrunk
in turn. What cannot be told from names stands in `exceptions.py`.
"""

import inspect
import re
from collections.abc import Callable
from typing import Any

from tests.zoo.exceptions import SETTINGS

VOCABULARY = 96
LABELS = 3
WORDS_FROM = 48
"""Ids below are special tokens; the inputs are made of those from here on."""

WIDTH, HEADS, KV_HEADS, HEAD_DIM = 32, 4, 2, 8
LAYERS = 2
KEPT = 4
"""At most so many kinds of layers are kept of a hybrid model."""

_SKIPPED = {
    "architectures", "chunk_size_feed_forward", "dtype", "id2label", "is_encoder_decoder",
    "kwargs", "label2id", "output_hidden_states", "problem_type", "return_dict", "self",
    "transformers_version",
}  # fmt: skip
_COUNTS_LAYERS = r"n_layers?|num(_hidden)?_layers|depth"


def _at_most(limit: float) -> Callable[[Any], Any]:
    def shrunk(default: Any) -> Any:
        if isinstance(default, (list, tuple)):
            return type(default)(min(entry, limit) for entry in default)
        return min(default, limit)

    return shrunk


def _stages(first: int, double: bool = True) -> Callable[[Any], Any]:
    """Return a rule for a list with one entry per stage: it keeps its length."""

    def shrunk(default: Any) -> Any:
        if isinstance(default, (list, tuple)):
            growth = [2 ** min(i, 3) if double else 1 for i in range(len(default))]
            return type(default)(first * factor for factor in growth)
        return first

    return shrunk


def _no_dropout(default: Any) -> Any:
    return type(default)(0.0 for _ in default) if isinstance(default, (list, tuple)) else 0.0


_RULES: list[tuple[str, Any]] = [
    (r"type_vocab_size", _at_most(2)),
    (r"(.*_)?vocab_size(_.*)?|unpadded_vocab_size|vocab_offset", VOCABULARY),
    (r".*(drop_?out|drop_path|pdrop|layerdrop|droppath).*(?<!type)", _no_dropout),
    (r"num_kv_shared_layers|.*jitter.*", 0),
    (r"first_k_dense_replace|num_dense_layers", _at_most(1)),
    (r"num_mtp_layers|num_nextn_predict_layers", 0),
    (_COUNTS_LAYERS, _stages(LAYERS, double=False)),
    (r"(encoder|decoder)_layers|num_(en|de)coder_layers|num_.*_layers|n_.*_layers", _at_most(2)),
    (r"depths|num_blocks|layer_depths|num_conv_blocks", _stages(LAYERS, double=False)),
    (r"n_groups?|topk_group|num_groups|.*_n_groups", _at_most(1)),
    (r".*(experts|expert)_per_(tok|token)|moe_topk|moe_k|top_k_experts|experts_top_k", 2),
    (r"(moe_)?num_shared_experts|n_shared_experts", _at_most(1)),
    (r".*num(_local|_routed)?_experts|n_routed_experts|.*num_experts", 4),
    (r"(.*_)?(num_(key_value|kv)|n_kv|kv_n|num_global_key_value)_heads", KV_HEADS),
    (r".*(num_|n_)(attention_|key_|value_|mamba_|decoder_)*heads|.*attention_heads|n_head",
     _stages(HEADS)),
    (r"(.*_)?head_dim|dim_head|d_head|d_kv|qk_(rope|nope)_head_dim|.*_head_size|attn_head_dim",
     HEAD_DIM),
    (r".*lora_rank", 16),
    (r".*intermediate_size(s)?|.*ffn(_hidden)?(_dim|_size)|d_ff|d_inner|n_inner|mlp_dim|ff_dim",
     _stages(48, double=False)),
    (r"hidden_sizes|embed_dims|encoder_hidden_size|neck_hidden_sizes", _stages(16)),
    (r"(.*_)?hidden_size(_per_layer_input)?|(.*_)?hidden_dim|d_model|d_embed|embedding_size",
     _stages(WIDTH)),
    (r"n_embd|(emb_|embed_|embedding_|projection_|output_)?dim|output_proj_dims", _stages(WIDTH)),
    (r"n_positions|max_(2d_)?position_embeddings|max_seq_len|max_(source|target)_positions",
     _at_most(64)),
    (r"(.*_)?(sliding_window|local_attention|attention_window|(block|window|chunk)_size)",
     _at_most(8)),
    (r"num_filters", _at_most(4)),
    (r"initializer_range", 0.1),  # what suits the width: with less, deep models pass no gradient
    (r"depth_multiplier", _at_most(0.25)),
    (r"image_size|img_size", _stages(32, double=False)),
    (r"patch_size", _at_most(8)),
    (r"num_labels", LABELS),
]  # fmt: skip
_ORDER = [(re.compile(pattern), rule) for pattern, rule in _RULES]
_OPEN = {
    "vocab_size": VOCABULARY,
    "head_dim": HEAD_DIM,
    "num_key_value_heads": KV_HEADS,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_ID = re.compile(r".*(_token_id|_token_index|_token_ids|_token_indices|_index_id)")


_NONE = inspect.Parameter.empty


def shrink(config_class: type, **settings: Any) -> Any:
    """Return a tiny configuration of this class; `settings` win over what the names say."""
    exceptional = SETTINGS.get(config_class.__name__, {}) | settings
    fields = _fields(config_class)
    required = {n: v for n, v in exceptional.items() if fields.get(n, _NONE) is _NONE}
    default = config_class(**required)
    small = _per_layer(config_class, default)
    small |= {k: v for k, v in _by_name(config_class).items() if k not in small}
    inside = {name: exceptional.pop(name, {}) for name in _inner(default)}
    small |= {n: shrink(type(i), **inside[n]) for n, i in _inner(default).items()}
    small |= _left_open(config_class, default) | _ids(config_class)
    if "kv_lora_rank" in small:  # multi-head latent attention: keys are unpacked to every head
        small["num_key_value_heads"] = HEADS
    config = config_class(**(small | exceptional))
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    return config


def _fields(config_class: type) -> dict[str, Any]:
    parameters = inspect.signature(config_class.__init__).parameters
    return {name: p.default for name, p in parameters.items() if name not in _SKIPPED}


def _by_name(config_class: type) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, default in _fields(config_class).items():
        numeric = isinstance(default, (int, float, list, tuple)) and not isinstance(default, bool)
        if not numeric or _ID.fullmatch(name):
            continue
        rule = next((rule for pattern, rule in _ORDER if pattern.fullmatch(name)), None)
        if rule is not None:
            value = rule(default) if callable(rule) else rule
            found[name] = value if isinstance(value, (list, tuple)) else type(default)(value)
    return found


def _left_open(config_class: type, default: Any) -> dict[str, int]:
    """Return counts that a published configuration always gives, and the class leaves empty."""
    fields = _fields(config_class)
    return {n: v for n, v in _OPEN.items() if n in fields and _get(default, n, 0) is None}


def _per_layer(config_class: type, default: Any) -> dict[str, Any]:
    """Return the lists with one entry per layer, with an entry of each kind, and their length."""
    names = [n for n in _fields(config_class) if re.fullmatch(_COUNTS_LAYERS, n)]
    count = _get(default, names[0]) if names else None
    if not isinstance(count, int) or count <= LAYERS:
        return {}
    fields = _fields(config_class)
    lists = {n: v for n in fields if isinstance(v := _get(default, n), (list, tuple))}
    lists = {n: v for n, v in lists.items() if len(v) == count}
    if not lists:
        return {}
    first: dict[tuple[Any, ...], int] = {}
    for i in range(count):
        first.setdefault(tuple(str(v[i]) for v in lists.values()), i)
    kept = sorted(first.values())[:KEPT]
    kept += [i for i in range(count) if i not in kept][: max(0, LAYERS - len(kept))]
    picked: dict[str, Any] = {n: [v[i] for i in sorted(kept)] for n, v in lists.items()}
    return picked | {names[0]: len(kept)}


def _inner(default: Any) -> dict[str, Any]:
    """Return the configurations inside by name."""
    inner = {name: _get(default, name) for name in getattr(default, "sub_configs", None) or {}}
    return {name: config for name, config in inner.items() if hasattr(config, "to_dict")}


def _get(config: Any, name: str, missing: Any = None) -> Any:
    """Return a setting; `missing` where there is none, or one that differs by layer."""
    try:
        return getattr(config, name, missing)
    except RuntimeError:
        return missing


def _ids(config_class: type) -> dict[str, int | None]:
    """Return ids inside the vocabulary, a different one for each name."""
    names = [name for name in _fields(config_class) if _ID.fullmatch(name)]
    fields = _fields(config_class)
    ids: dict[str, Any] = {}
    for name in names:
        if name in _IDS:
            ids[name] = _IDS[name]
        elif isinstance(fields[name], int):
            ids[name] = 3 + sum(map(ord, name)) % (WORDS_FROM - 3)
    return ids
