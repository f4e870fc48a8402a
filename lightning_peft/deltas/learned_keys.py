"""Learned keys and values in attention, and where a model takes them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.delta import Delta
from lightning_peft.deltas.passing import new_key, show, shown
from lightning_peft.errors import ConfigError, TargetError
from lightning_peft.ops.bottleneck import Gating, gate
from lightning_peft.ops.prefix import attend_to_prefix
from lightning_peft.structure.probe import Attention, probe
from lightning_peft.structure.targets import Patterns, Targets, as_targets


class FurtherKeys(Delta, ABC):
    """Keys and values that every query of an attention module sees, however they are made."""

    def __init__(self, seen: Attention, dropout: float) -> None:
        super().__init__()
        self.spread = (seen.key_spread, seen.value_spread)
        self.dropout = nn.Dropout(dropout) if dropout else None

    @abstractmethod
    def learned(self) -> tuple[Tensor, Tensor]:
        """Return keys `(key_heads, n, d_head)` and values `(key_heads, n, d_value)`."""

    @abstractmethod
    def start_at(self, key: Tensor, value: Tensor) -> None:
        """Make `learned` return these to begin with."""

    def dropped(self) -> tuple[Tensor, Tensor]:
        """Return what is learned, with dropout in training."""
        key, value = self.learned()
        return (self.dropout(key), self.dropout(value)) if self.dropout else (key, value)

    def attend(
        self,
        host: nn.Module,
        base: Callable[..., Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        **kwargs: Any,
    ) -> Any:
        """Return the attention over the learned keys and values and the host's own."""
        return attend_to_prefix(*self.dropped(), host, base, query, key, value, mask, **kwargs)


class LearnedKeys(FurtherKeys):
    """Keys and values that are trained as they are.

    Shapes: `key` `(key_heads, n, d_head)`, `value` `(key_heads, n, d_value)`.
    """

    def __init__(self, seen: Attention, tokens: int, dropout: float) -> None:
        super().__init__(seen, dropout)
        self.key = nn.Parameter(fresh(seen.key, len(seen.key), tokens, seen.key.shape[-1]))
        self.value = nn.Parameter(fresh(seen.value, len(seen.value), tokens, seen.value.shape[-1]))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw from a normal distribution, as wide as the keys and values of real tokens are."""
        for parameter, spread in zip((self.key, self.value), self.spread, strict=True):
            nn.init.normal_(parameter, std=spread)

    def learned(self) -> tuple[Tensor, Tensor]:
        """Return the parameters."""
        return self.key, self.value

    def start_at(self, key: Tensor, value: Tensor) -> None:
        """Copy the start into the parameters."""
        with torch.no_grad():
            self.key.copy_(key)
            self.value.copy_(value)


class GatedKeys(Delta):
    """Learned keys and values behind a gate, which is made from what the host receives.

    Per token the gate g scales the share λ of the attention that the keys P take:

        y = (1 - g λ) softmax(q kᵀ) v + g λ softmax(q P_kᵀ) P_v

    Per sequence it multiplies P_k and P_v themselves, as the authors' code has it.

    Shapes: `gate` `(1, d_model)`, `gate_bias` `(1,)`.
    """

    def __init__(self, keys: FurtherKeys, seen: Attention, per: Gating) -> None:
        super().__init__()
        self.keys, self.per, self.passing = keys, per, new_key()
        self.tokens_first = seen.tokens_first
        self.gate = nn.Parameter(fresh(seen.key, 1, seen.input_width))
        self.gate_bias = nn.Parameter(fresh(seen.key, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The gate is half open, a little more or less by the token."""
        nn.init.normal_(self.gate, std=0.02)
        nn.init.zeros_(self.gate_bias)

    def before(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Leave the inputs as they are and note the first, which makes the gate."""
        show(self.passing, args, kwargs)
        return args, kwargs

    def forward(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Leave the output as it is and forget the input."""
        shown(self.passing, keep=False)
        return output

    def attend(
        self,
        host: nn.Module,
        base: Callable[..., Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        **kwargs: Any,
    ) -> Any:
        """Return the attention over the host's own keys and values and the gated ones."""
        x = self._states(shown(self.passing))
        opened = gate(x, self.gate, self.gate_bias, self.per).unsqueeze(-1)
        k, v = self.keys.dropped()
        if self.per == "sequence":  # (batch, 1, 1, 1)
            return attend_to_prefix(
                k * opened, v * opened, host, base, query, key, value, mask, **kwargs
            )
        own = base(host, query, key, value, mask, **kwargs)[0]
        y, *rest = attend_to_prefix(k, v, host, base, query, key, value, mask, **kwargs)
        return torch.lerp(own, y, _for_each_head(opened, own).to(y.dtype)), *rest

    def _states(self, x: Tensor) -> Tensor:
        """Return what the host received as `(batch, tokens, d_model)`."""
        if x.is_nested:  # which the host pads too
            return x.to_padded_tensor(0.0)
        if x.dim() == 2:
            return x[None]
        return x.transpose(0, 1) if self.tokens_first else x.flatten(1, -2)


def _for_each_head(opened: Tensor, output: Tensor) -> Tensor:
    """Return a gate `(batch, tokens, 1, 1)` as an `output` takes it, which may fold the batch."""
    # A delta around this one may have put dummies before the queries, whose rows it throws away.
    opened = F.pad(opened, (0, 0, 0, 0, output.shape[1] - opened.shape[1], 0))
    if len(opened) == len(output):
        return opened
    rows = opened.squeeze(-1).permute(2, 1, 0)  # (1, tokens, batch)
    return rows.repeat_interleave(output.shape[2] // len(opened), 2).unsqueeze(-1)


def chosen(
    model: nn.Module,
    targets: Targets | Patterns | None,
    layers: Sequence[int] | None,
    ids: Sequence[int] = (),
) -> dict[str, Attention]:
    """Return the attention modules to change by name, and what they saw in a probe of `ids`.

    Raises:
        TargetError: the model has no attention, or a pattern matches none of it.
    """
    seen = probe(model, ids)
    choice = as_targets(targets, layers)
    if choice.include is None:
        choice = Targets(tuple(seen), choice.exclude, choice.layers)
    hosts = {id(model.get_submodule(name)) for name in seen}
    found = choice.find(model, lambda m: id(m) in hosts, "attention modules that the model runs")
    return {name: seen[name] for name in found}


def check(tokens: int, dropout: float, ids: Sequence[int]) -> None:
    """Refuse settings out of their range.

    Raises:
        ConfigError: a setting is out of its range.
    """
    if tokens < 1:
        raise ConfigError(f"`tokens` must be at least 1, but is {tokens} instead.")
    if not 0 <= dropout < 1:
        raise ConfigError(f"`dropout` must lie in [0, 1), but is {dropout} instead.")
    if ids and len(ids) != tokens:
        raise ConfigError(
            f"`start_ids` must hold as many ids as there are `tokens`, {tokens}, but holds "
            f"{len(ids)} instead."
        )


def require_inputs(seen: Mapping[str, Attention]) -> None:
    """Refuse attention modules whose inputs a gate for each token cannot be made from.

    Raises:
        TargetError: one does not receive one state for each query.
    """
    for name, attention in seen.items():
        if not attention.input_width:
            raise TargetError(
                f"`{name}` does not receive one state for each of its queries, from which a gate "
                "could be made: set `gating` to None, or give other `targets`."
            )


def start_at_tokens(
    deltas: Mapping[str, FurtherKeys], seen: Mapping[str, Attention], tokens: int
) -> None:
    """Start at the keys and values that the base gives the tokens of the probe.

    Raises:
        ConfigError: an attention module does not see the tokens one by one.
    """
    for name, delta in deltas.items():
        if seen[name].key.shape[1] != tokens:
            raise ConfigError(
                f"`start_ids` must be empty, since `{name}` saw {seen[name].key.shape[1]} keys for "
                f"{tokens} tokens: give `targets` that see the tokens."
            )
        delta.start_at(seen[name].key, seen[name].value)


def fresh(like: Tensor, *shape: int) -> Tensor:
    """Return an empty master copy: never narrower than float32, whatever the base is stored in."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.empty(shape, dtype=dtype, device=like.device)
