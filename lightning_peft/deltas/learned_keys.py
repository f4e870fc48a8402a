"""Learned keys and values in attention, and where a model takes them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.delta import Delta
from lightning_peft.errors import ConfigError
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
        k, v = self.learned()
        # A second attention of the host, narrower than its main one, is left as it is.
        if k.shape[-1] != key.shape[-1]:
            return base(host, query, key, value, mask, **kwargs)
        if self.dropout:
            k, v = self.dropout(k), self.dropout(v)
        return attend_to_prefix(k, v, host, base, query, key, value, mask, **kwargs)


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
