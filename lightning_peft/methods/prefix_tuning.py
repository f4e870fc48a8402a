"""Prefix-tuning (Li and Liang 2021, https://arxiv.org/abs/2101.00190).

In every attention module n learned keys and values stand before those of the tokens:

    y = softmax(q [P_k; k]ᵀ / √d_head) [P_v; v],    P_k, P_v ∈ R^(heads × n × d_head)

With a `bottleneck` of b they are not trained as they are, but as the output of a network, which
makes them learn more steadily:

    [P_k; P_v] = W₂ tanh(W₁ E + c₁) + c₂,    E ∈ R^(n × d_model), W₁ ∈ R^(b × d_model)

E, W₁ and c₁ are shared by all attention modules of a kind (encoder, decoder, cross), as in the
paper; W₂ and c₂ are each module's own. A gate scales what the prefix does (UniPELT, Mao et al.
2022, https://arxiv.org/abs/2110.07577).
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.delta import CONTAINERS, Delta
from lightning_peft.deltas.cached_keys import CachedKeys, Caching, order_of
from lightning_peft.deltas.learned_keys import (
    FurtherKeys,
    GatedKeys,
    LearnedKeys,
    check,
    chosen,
    fresh,
    require_inputs,
    start_at_tokens,
)
from lightning_peft.deltas.virtual_tokens import Layout
from lightning_peft.errors import ConfigError
from lightning_peft.method import Method
from lightning_peft.ops.bottleneck import Gating, check_gating
from lightning_peft.structure.caches import caching
from lightning_peft.structure.probe import Attention
from lightning_peft.structure.targets import Patterns, Targets
from lightning_peft.structure.words import as_many, check_tokens, ids_of_text


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(Method):
    """Learned keys and values in the attention of every layer, by default through a network.

    Raises:
        ConfigError: a setting is out of its range.
    """

    kind: ClassVar[str] = "prefix"
    starts_as_base: ClassVar[bool] = False

    tokens: int = 20
    """How many keys and values each attention module gets."""

    bottleneck: int | None = None
    """Width b of the network that makes them; None trains them as they are."""

    dropout: float = 0.0
    """Probability with which an entry of them is zeroed during training."""

    start_text: str = ""
    """A text, cut or repeated to `tokens`, to start from; its ids are kept in `start_ids`."""

    tokenizer: str = ""
    """Name or folder of the tokenizer for `start_text`, in most cases that of the model."""

    start_ids: Sequence[int] = ()
    """Ids of as many tokens, whose keys and values are the start; empty starts at random."""

    gating: Gating | None = None
    """Scale its share of the attention by a trained gate, for each token or by the sequence."""

    targets: Targets | Patterns | None = None
    """Which attention modules: None (all that the model runs) or patterns."""

    layers: Sequence[int] | None = None
    """Indices of the layers to change (negative ones count from the top); None changes all."""

    layout: Layout = "clean"
    """Enter in attention, "clean", or by the cache, "peft", where positions move on by `tokens`."""

    def __post_init__(self) -> None:
        if self.start_text and not self.start_ids:
            ids = ids_of_text("start_text", self.start_text, self.tokenizer)
            object.__setattr__(self, "start_ids", as_many(ids, self.tokens))
        check(self.tokens, self.dropout, self.start_ids)
        check_tokens(self.tokens, self.layout)
        if self.layout == "peft" and (self.gating or self.targets or self.layers is not None):
            raise ConfigError(
                "`layout` must be 'clean' beside `gating`, `targets` or `layers`, but is 'peft' "
                "instead: the cache that it fills belongs to all layers alike."
            )
        check_gating(self.gating)
        if self.bottleneck is not None and self.bottleneck < 1:
            raise ConfigError(
                f"`bottleneck` must be at least 1, or None, but is {self.bottleneck} instead."
            )

    def deltas(self, model: nn.Module) -> dict[str, Delta]:
        """Return a prefix for each attention module, and above them the part that they share."""
        if self.layout == "peft":
            return self._cached(caching(model, self.tokens, self.start_ids))
        seen = chosen(model, self.targets, self.layers, self.start_ids)
        trunks = {} if self.bottleneck is None else self._trunks(seen, self.bottleneck)
        made = {name: self._delta(s, trunks.get(_kind(name))) for name, s in seen.items()}
        if self.start_ids:
            start_at_tokens(made, seen, self.tokens)
        above: dict[str, Delta] = {}
        if trunks:
            above = {_above(model, list(made)): Trunks(list(trunks.values()))}
        return {**above, **self._gated(made, seen)}

    def _cached(self, host: Caching) -> dict[str, Delta]:
        order = order_of(len(host.layers), host.crossing)
        seen = {str(i): host.layers[order.index(i)] for i in sorted(set(order))}
        trunks = {} if self.bottleneck is None else self._trunks(seen, self.bottleneck)
        made = {name: self._delta(s, trunks.get(_kind(name))) for name, s in seen.items()}
        if self.start_ids:
            start_at_tokens(made, seen, self.tokens)
        which = [list(made).index(str(i)) for i in order]
        return {host.name: CachedKeys(host, list(made.values()), which, list(trunks.values()))}

    def _gated(
        self, made: Mapping[str, FurtherKeys], seen: Mapping[str, Attention]
    ) -> Mapping[str, Delta]:
        if self.gating is None:
            return made
        require_inputs(seen)
        return {name: GatedKeys(keys, seen[name], self.gating) for name, keys in made.items()}

    def _trunks(self, seen: Mapping[str, Attention], bottleneck: int) -> "dict[str, Trunk]":
        trunks: dict[str, Trunk] = {}
        for name, s in seen.items():
            if _kind(name) not in trunks:
                trunks[_kind(name)] = Trunk(s, self.tokens, bottleneck)
        return trunks

    def _delta(self, seen: Attention, trunk: "Trunk | None") -> FurtherKeys:
        if trunk is None:
            return LearnedKeys(seen, self.tokens, self.dropout)
        return ProjectedKeys(seen, trunk, self.dropout)


class Trunk(nn.Module):
    """The part of the network that the attention modules of one kind share.

    Shapes: `embedding` `(n, d_model)`, `weight` `(b, d_model)`, `bias` `(b,)`.
    """

    def __init__(self, seen: Attention, tokens: int, bottleneck: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(fresh(seen.key, tokens, seen.width))
        self.weight = nn.Parameter(fresh(seen.key, bottleneck, seen.width))
        self.bias = nn.Parameter(fresh(seen.key, bottleneck))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw normally, so that what goes into the tanh has unit variance."""
        nn.init.normal_(self.embedding)
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        nn.init.zeros_(self.bias)

    def forward(self) -> Tensor:
        """Return the hidden states, `(n, b)`."""
        return F.linear(self.embedding, self.weight, self.bias).tanh()


class Trunks(Delta):
    """The shared parts, kept above the attention modules; they change nothing by themselves.

    Each attention module runs its trunk anew: there is no state of a call, which checkpointing,
    compilation and threads would have to respect, and it costs next to nothing.
    """

    def __init__(self, trunks: Sequence[Trunk]) -> None:
        super().__init__()
        self.trunks = nn.ModuleList(trunks)


class ProjectedKeys(FurtherKeys):
    """Keys and values of one attention module, made from a trunk's hidden states.

    Shapes: `key_weight` `(key_heads, d_head, b)`, `key_bias` `(key_heads, d_head)`, and so for the
    values.
    """

    def __init__(self, seen: Attention, trunk: Trunk, dropout: float) -> None:
        super().__init__(seen, dropout)
        # In a tuple it is not registered: its parameters belong to `Trunks`, which saves them.
        self.shared = (trunk,)
        width, shapes = len(trunk.bias), [(len(x), x.shape[-1]) for x in (seen.key, seen.value)]
        self.key_weight = nn.Parameter(fresh(seen.key, *shapes[0], width))
        self.key_bias = nn.Parameter(fresh(seen.key, *shapes[0]))
        self.value_weight = nn.Parameter(fresh(seen.value, *shapes[1], width))
        self.value_bias = nn.Parameter(fresh(seen.value, *shapes[1]))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights that give keys and values as wide as those of real tokens are."""
        for weight, spread in zip((self.key_weight, self.value_weight), self.spread, strict=True):
            nn.init.normal_(weight, std=spread / (_SECOND_MOMENT * weight.shape[-1]) ** 0.5)
        nn.init.zeros_(self.key_bias)
        nn.init.zeros_(self.value_bias)

    def learned(self) -> tuple[Tensor, Tensor]:
        """Return what the network makes."""
        hidden = self.shared[0]()
        return (
            _output(hidden, self.key_weight, self.key_bias),
            _output(hidden, self.value_weight, self.value_bias),
        )

    def start_at(self, key: Tensor, value: Tensor) -> None:
        """Choose weights that make these, by least squares.

        Raises:
            ConfigError: the bottleneck is too narrow to make them.
        """
        with torch.no_grad():
            inverse = torch.linalg.pinv(self.shared[0]().double())  # (b, n)
            if inverse.shape[0] < inverse.shape[1]:
                raise ConfigError(
                    f"`bottleneck` must be at least the number of `start_ids`, "
                    f"{inverse.shape[1]}, but is {inverse.shape[0]} instead."
                )
            self.key_weight.copy_((inverse @ key.double()).transpose(1, 2))
            self.value_weight.copy_((inverse @ value.double()).transpose(1, 2))


_SECOND_MOMENT = 0.394
"""The mean of tanh(x)² where x has a standard normal distribution."""


def _output(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return `(heads, n, d)`."""
    flat = F.linear(hidden, weight.flatten(0, 1), bias.flatten())
    return flat.unflatten(-1, bias.shape).transpose(0, 1)


def _kind(name: str) -> str:
    """Return the name without the numbers in it: the same for the like modules of all layers."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", f".{name}")


def _above(model: nn.Module, hosts: Sequence[str]) -> str:
    """Return the name of the innermost module around all `hosts` that can carry a delta."""
    paths = [host.split(".")[:-1] for host in hosts]
    shared = [parts[0] for parts in itertools.takewhile(_alike, zip(*paths, strict=False))]
    while shared and isinstance(model.get_submodule(".".join(shared)), CONTAINERS):
        shared.pop()
    return ".".join(shared)


def _alike(parts: tuple[str, ...]) -> bool:
    return len(set(parts)) == 1
