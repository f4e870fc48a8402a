"""Attention with further keys and values in front of the present ones."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend_to_prefix(
    further_key: Tensor,
    further_value: Tensor,
    host: nn.Module,
    base: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **kwargs: Any,
) -> Any:
    """Return the attention `base` over further keys, which every query sees, and its own.

    Masks and position biases are extended, by True, 1 or 0, so that padding, causality and packed
    sequences stay what they are. A causal attention without a mask counts from the corner, so there
    the queries get as many dummies in front, whose rows are thrown away: no mask is ever built.
    A second attention of a host, narrower than its main one, is left as it is.

    Args:
        further_key: `(key_heads, n, d_head)`, or `(batch, key_heads, n, d_head)`.
        further_value: `(key_heads, n, d_value)`, or `(batch, key_heads, n, d_value)`.
        host: the attention module.
        base: its attention, as in `Delta.attend`, which says what the rest is.
        query: `(batch, heads, tokens, d_head)`.
        key: `(batch, key_heads, keys, d_head)`.
        value: `(batch, key_heads, keys, d_value)`.
        mask: boolean, additive or None.
        kwargs: what else `base` takes.
    """
    if further_key.shape[-1] != key.shape[-1]:
        return base(host, query, key, value, mask, **kwargs)
    count = further_key.shape[-2]
    key = torch.cat([_spread(further_key, key), key], 2)
    value = torch.cat([_spread(further_value, value), value], 2)
    dummies = count if mask is None and query.shape[2] > 1 and _is_causal(host, kwargs) else 0
    if (bias := kwargs.get("position_bias")) is not None:
        kwargs["position_bias"] = F.pad(bias, (count, 0, dummies, 0))
    if mask is not None and mask.shape[-1] != 1:
        mask = F.pad(mask, (count, 0), value=0 if mask.is_floating_point() else 1)
    if not dummies:
        return base(host, query, key, value, mask, **kwargs)
    for name, x in kwargs.items():  # what else has a row for each query
        if name != "position_bias" and _is_by_query(x, query):
            kwargs[name] = F.pad(x, (0, 0, dummies, 0))
    output, *rest = base(host, F.pad(query, (0, 0, dummies, 0)), key, value, mask, **kwargs)
    return output[:, dummies:], *rest


def _is_causal(host: nn.Module, kwargs: dict[str, Any]) -> bool:
    # As transformers' sdpa decides.
    causal = kwargs.get("is_causal")
    return bool(getattr(host, "is_causal", True) if causal is None else causal)


def _is_by_query(x: Any, query: Tensor) -> bool:
    return isinstance(x, Tensor) and x.dim() == 4 and x.shape[1:3] == query.shape[1:3]


def _spread(further: Tensor, like: Tensor) -> Tensor:
    """Return the further keys for each row of the batch.

    Where an attention folds its batch into the heads, the heads repeat for each row.
    """
    further = further.to(like.dtype)
    if further.dim() == 4 and len(further) != len(like):
        further = further.flatten(0, 1)
    times = like.shape[1] // further.shape[-3]
    if times > 1:
        further = torch.cat([further] * times, -3)
    return further.expand(len(like), -1, -1, -1)
