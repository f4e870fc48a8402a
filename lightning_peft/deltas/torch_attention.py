"""The attention of `nn.MultiheadAttention`, open to deltas.

PyTorch's own function takes learned keys for one position only (`bias_k`), and its fast path reads
the weights in one kernel. So while a delta is active the module computes by the same formula here.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_peft.delta import Attending, through_deltas


class MultiHead(Attending):
    """Mixin of an `nn.MultiheadAttention` whose attention passes through its deltas."""

    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output, and the attention weights where they are needed."""
        base = _weighed if need_weights else _scaled
        attend = through_deltas(base, self)
        if attend is base:
            output: tuple[Tensor, Tensor | None] = super().forward(  # type: ignore[misc]
                query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
            return output
        if query.is_nested:
            return self._of_nested(query), None
        batched, first = query.dim() == 3, self.batch_first or query.dim() == 2
        inputs = [x if batched else x[None] for x in (query, key, value)]
        q, k, v = _projected(self, [x if first else x.transpose(0, 1) for x in inputs])
        mask = _merged(attn_mask, key_padding_mask, q)
        k, v, mask = _extended(self, k, v, mask)
        dropout = self.dropout if self.training else 0.0
        y, weights = attend(self, q, k, v, mask, is_causal=False, dropout=dropout)
        y = F.linear(y.flatten(2), self.out_proj.weight, self.out_proj.bias)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        return (y if first else y.transpose(0, 1)) if batched else y[0], weights

    def _of_nested(self: Any, x: Tensor) -> Tensor:
        # What `nn.TransformerEncoder` makes of a padded batch in eval mode.
        rows = x.unbind()
        lengths = torch.tensor([len(row) for row in rows], device=x.device)
        padded = x.to_padded_tensor(0.0)
        padding = torch.arange(padded.shape[1], device=x.device) >= lengths[:, None]
        y, _ = self.forward(padded, padded, padded, padding, need_weights=False)
        return torch.nested.as_nested_tensor(
            [r[: len(row)] for r, row in zip(y, rows, strict=True)]
        )


def _projected(host: Any, inputs: list[Tensor]) -> list[Tensor]:
    """Return queries, keys and values, each `(batch, heads, tokens, d_head)`."""
    biases = (None,) * 3 if host.in_proj_bias is None else host.in_proj_bias.chunk(3)
    if host.in_proj_weight is None:
        weights = (host.q_proj_weight, host.k_proj_weight, host.v_proj_weight)
    else:
        weights = host.in_proj_weight.chunk(3)
    flat = [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]
    return [x.unflatten(-1, (host.num_heads, -1)).transpose(1, 2) for x in flat]


def _merged(mask: Tensor | None, padding: Tensor | None, query: Tensor) -> Tensor | None:
    """Return one additive mask `(batch or 1, heads or 1, queries or 1, keys)`."""
    batch, heads = query.shape[:2]
    if mask is not None:
        mask = _additive(mask, query.dtype)
        mask = mask.view(-1, heads if mask.dim() == 3 else 1, *mask.shape[-2:])
    if padding is None:
        return mask
    padding = _additive(padding, query.dtype).view(batch if padding.dim() == 2 else 1, 1, 1, -1)
    return padding if mask is None else mask + padding


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def _extended(
    host: Any, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Append the module's own learned position, and its position of zeros."""
    pairs = [] if host.bias_k is None else [(host.bias_k, host.bias_v)]
    pairs += [(key.new_zeros(1), value.new_zeros(1))] if host.add_zero_attn else []
    for bias_k, bias_v in pairs:
        key = torch.cat([key, _position(bias_k, key)], 2)
        value = torch.cat([value, _position(bias_v, value)], 2)
        mask = None if mask is None else F.pad(mask, (0, 1))
    return key, value, mask


def _position(bias: Tensor, like: Tensor) -> Tensor:
    batch, heads, _, dim = like.shape
    one = bias if bias.numel() == 1 else bias.view(1, heads, 1, dim)
    return one.expand(batch, heads, 1, dim)


def _scaled(
    host: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, **_: Any
) -> tuple[Tensor, None]:
    return F.scaled_dot_product_attention(q, k, v, mask, dropout).transpose(1, 2), None


def _weighed(
    host: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, **_: Any
) -> tuple[Tensor, Tensor]:
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
    weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
    return (weights @ v).transpose(1, 2), weights
