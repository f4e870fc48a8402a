"""The arithmetic of bottleneck adapters, and the gates of UniPELT."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_peft.errors import ConfigError

Activation = Callable[[Tensor], Tensor]
Gating = Literal["token", "sequence"]

ACTIVATIONS: dict[str, Activation] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "identity": torch.Tensor.contiguous,
}
"""The functions that a setting `activation` names."""


def check_gating(gating: Gating | None) -> None:
    """Refuse what is no kind of gate.

    Raises:
        ConfigError: it is none.
    """
    if gating not in (None, "token", "sequence"):
        raise ConfigError(f"`gating` must be token, sequence or None, but is {gating!r} instead.")


def bottleneck(
    x: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    activation: Activation,
) -> Tensor:
    """Return `U f(D x + d) + u`; the small matrices are cast to the dtype of `x`.

    Args:
        x: `(..., width)`.
        down: `(size, width)`.
        down_bias: `(size,)`.
        up: `(width, size)`.
        up_bias: `(width,)`.
        activation: the function f.
    """
    dtype = x.dtype
    hidden = activation(F.linear(x, down.to(dtype), down_bias.to(dtype)))
    return F.linear(hidden, up.to(hidden.dtype), up_bias.to(hidden.dtype))


def gate(x: Tensor, weight: Tensor, bias: Tensor, per: Gating) -> Tensor:
    """Return a gate between 0 and 1 from what a sub-layer receives (UniPELT, equation 4).

    Args:
        x: `(..., tokens, width)`.
        weight: `(1, width)`.
        bias: `(1,)`.
        per: one gate for each token, or their mean over the sequence as the paper's code has it;
            what comes as one list of tokens, `(tokens, width)`, has no sequences.

    Returns:
        `(..., tokens, 1)`, or `(..., 1, 1)` per sequence.
    """
    opened = torch.sigmoid(F.linear(x, weight.to(x.dtype), bias.to(x.dtype)))
    return opened if per == "token" or x.dim() < 3 else opened.mean(dim=-2, keepdim=True)


def gated(change: Tensor, x: Tensor, weight: Tensor, bias: Tensor, per: Gating) -> Tensor:
    """Return a `change`, `(..., tokens, d)`, times the `gate` of `x`."""
    if not x.is_nested:
        return change * gate(x, weight, bias, per)
    # What `nn.TransformerEncoder` makes of a padded batch in eval mode does not broadcast.
    rows = [
        gated(c[None], row[None], weight, bias, per)[0]
        for c, row in zip(change.unbind(), x.unbind(), strict=True)
    ]
    return torch.nested.as_nested_tensor(rows)
