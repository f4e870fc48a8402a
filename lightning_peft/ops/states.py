"""Further states behind those that `nn.TransformerEncoder` encodes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ARGUMENTS = ("src", "mask", "src_key_padding_mask", "is_causal")


def append_states(
    host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], states: Tensor
) -> dict[str, Any]:
    """Return the arguments of an `nn.TransformerEncoder` with `states`, `(n, d)`, in each row.

    They stand last, where they move no other, and every token sees them.
    """
    given = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
    dim, n = token_dim(host, given["src"]), len(states)
    given["src"] = append(given["src"], states, dim)
    if given.get("mask") is not None:  # true, or minus infinity, where a token does not see
        given |= {"mask": F.pad(given["mask"], (0, n, 0, n)), "is_causal": None}
    if given.get("src_key_padding_mask") is not None:
        given["src_key_padding_mask"] = F.pad(given["src_key_padding_mask"], (0, n))
    return given


def append(x: Tensor, states: Tensor, dim: int) -> Tensor:
    """Return `x`, `(..., tokens, ..., d)`, with `states`, `(n, d)`, behind its tokens at `dim`."""
    shape = [*x.shape]
    shape[dim] = len(states)
    rows = states.to(x.dtype) if dim == x.dim() - 2 else states.to(x.dtype).unsqueeze(1)
    return torch.cat([x, rows.expand(shape)], dim)


def token_dim(host: Any, x: Tensor) -> int:
    """Return the dimension of the tokens in what an `nn.TransformerEncoder` takes and gives."""
    return x.dim() - 2 if x.dim() == 2 or host.layers[0].self_attn.batch_first else 0
