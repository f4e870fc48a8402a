"""LoReFT: edit hidden states in a low-rank subspace (Wu et al. 2024).

    h ← h + Rᵀ (W h + b − R h),    R, W ∈ R^(r × width),  R Rᵀ = I

https://arxiv.org/abs/2404.03592. h is what a layer gives, at every position or at the first and
last ones of each sequence, where padding does not count. R stays orthonormal by construction: it is
the orthonormal factor of a free matrix, which starts orthonormal itself.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.delta import Delta
from lightning_peft.errors import AdapterError, ConfigError, TargetError
from lightning_peft.method import Method
from lightning_peft.structure import anatomy, sublayers
from lightning_peft.structure.drift import calls_forward, recomputing

_FAR = 2**30
"""Further from either end than any position that is edited."""


@dataclass(frozen=True, kw_only=True)
class LoReFT(Method):
    """Low-rank edits of the layers' hidden states.

    Raises:
        ConfigError: a setting is out of its range.
    """

    kind: ClassVar[str] = "loreft"
    starts_as_base: ClassVar[bool] = False

    r: int = 4
    """Rank of the edited subspace."""

    prefix: int | None = None
    """How many of the first positions are edited; None edits every position."""

    suffix: int = 0
    """How many of the last positions are edited, where `prefix` is a number."""

    tied: bool = False
    """Whether first and last positions share one edit."""

    layers: Sequence[int] | None = None
    """Indices of the layers to edit (negative ones count from the top); None edits all."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"`r` must be at least 1, but is {self.r} instead.")
        if self.suffix < 0 or (self.prefix is not None and self.prefix < 0):
            raise ConfigError(
                "`prefix` and `suffix` must not be negative, but they are "
                f"{self.prefix} and {self.suffix} instead."
            )
        if self.prefix is None and self.suffix:
            raise ConfigError(
                "`suffix` must be 0 where `prefix` is None and every position is edited, but is "
                f"{self.suffix} instead."
            )
        if self.prefix == 0 and self.suffix == 0:
            raise ConfigError("`prefix` or `suffix` must be at least 1, but both are 0.")

    def deltas(self, model: nn.Module) -> dict[str, Delta]:
        """Return an edit for each layer.

        Raises:
            TargetError: the model has no stack of layers, or not the ones that `layers` names.
        """
        stack = anatomy.layers(model)
        if not stack:
            raise TargetError(
                f"{type(model).__name__} has no stack of layers with hidden states to edit."
            )
        if wrong := [i for i in self.layers or () if not -len(stack) <= i < len(stack)]:
            raise TargetError(
                f"`layers` must lie in [-{len(stack)}, {len(stack)}), but {wrong[0]} does not."
            )
        chosen = stack if self.layers is None else [stack[i] for i in sorted(self.layers)]
        _check_gradients(model, chosen)
        outputs = {found.layer: found.output[1] for found in sublayers.sublayers(model)}
        said = getattr(getattr(model, "config", None), "hidden_size", None)
        hosts: dict[int, tuple[str, Delta]] = {}
        for i, named in enumerate(stack):
            name, block = _last_called(model, *named)
            if named in chosen and id(block) not in hosts:
                width = _width(block, outputs.get(i), said)
                hosts[id(block)] = name, Intervention(block, width, self)
        return dict(hosts.values())


class Edit(nn.Module):
    """h + Rᵀ (W h + b − R h) for hidden states `(..., width)`.

    Shapes: `source` (W) and `rotation` `(r, width)`, `source_bias` (b) `(r,)`.
    """

    def __init__(self, like: Tensor, width: int, r: int) -> None:
        super().__init__()
        # Master copies: never narrower than float32, whatever the base is stored in.
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.source = nn.Parameter(like.new_empty(r, width, dtype=dtype))
        self.source_bias = nn.Parameter(like.new_empty(r, dtype=dtype))
        self.rotation = nn.Parameter(like.new_empty(r, width, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """W is uniform as in a fresh Linear layer, b is zero, R is a random rotation's rows."""
        nn.init.kaiming_uniform_(self.source, a=math.sqrt(5))
        nn.init.zeros_(self.source_bias)
        nn.init.orthogonal_(self.rotation)

    def orthonormal(self) -> Tensor:
        """Return R, `(r, width)`: the orthonormal factor of `rotation`, with the same span."""
        q, triangle = torch.linalg.qr(self.rotation.T)
        return (q * triangle.diagonal().sign()).T  # so that R is `rotation` where it can be

    def forward(self, h: Tensor) -> Tensor:
        """Return the edited hidden states."""
        r = self.orthonormal()
        change = F.linear(h, (self.source - r).to(h.dtype), self.source_bias.to(h.dtype))
        return h + F.linear(change, r.T.to(change.dtype)).to(h.dtype)


class Intervention(Delta):
    """The edits of one layer's output."""

    def __init__(self, host: nn.Module, width: int, settings: LoReFT) -> None:
        super().__init__()
        like = next(p for p in host.parameters() if p.is_floating_point())
        self.settings, self.width = settings, width
        self.convolves = any(isinstance(m, sublayers.CONVOLUTIONS) for m in host.modules())
        apart = bool(settings.prefix and settings.suffix) and not settings.tied
        self.edit = Edit(like, width, settings.r)
        self.last = Edit(like, width, settings.r) if apart else None
        names = list(inspect.signature(type(host).forward).parameters)[1:]
        self.places = {n: i for i, n in enumerate(names) if n in ("attention_mask", *_CACHES)}

    def forward(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Return the output, and what is beside it in a tuple, with hidden states edited."""
        h = output[0] if isinstance(output, tuple | list) else output
        edited = self._everywhere(h) if self.settings.prefix is None else self._at(h, args, kwargs)
        return edited if h is output else type(output)((edited, *output[1:]))

    def _everywhere(self, h: Tensor) -> Tensor:
        if h.is_nested or not self._has_channels_first(h):
            return cast(Tensor, self.edit(h))
        return cast(Tensor, self.edit(h.movedim(1, -1)).movedim(-1, 1))

    def _has_channels_first(self, h: Tensor) -> bool:
        """Whether channels come before places, which a grid as wide as they are many hides."""
        if h.shape[-1] != self.width:
            return True
        return h.dim() > 3 and h.shape[1] == self.width and self.convolves

    def _at(self, h: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if h.dim() != 3 or self._has_channels_first(h):
            raise AdapterError(
                f"`prefix` must be None where hidden states are not (batch, tokens, {self.width}), "
                f"but is {self.settings.prefix} instead: they are {tuple(h.shape)} here."
            )
        given = {n: args[i] if i < len(args) else kwargs.get(n) for n, i in self.places.items()}
        mask = given.pop("attention_mask", None)
        cache = next((c for c in given.values() if c is not None), None)
        start, end = positions(h.shape[1], h.device, mask, cache)
        first = (start < (self.settings.prefix or 0)).unsqueeze(-1)
        last = (end < self.settings.suffix).unsqueeze(-1)
        if self.last is None:
            return torch.where(first | last, self.edit(h), h)
        return torch.where(last, self.last(h), torch.where(first, self.edit(h), h))


_CACHES = ("past_key_values", "past_key_value", "layer_past")


def positions(
    tokens: int, device: torch.device, mask: Tensor | None, cache: Any
) -> tuple[Tensor, Tensor]:
    """Return how far each token is from the first and from the last real one of its sequence.

    Args:
        tokens: how many tokens the layer received.
        device: where to.
        mask: what the layer received: None, `(batch, keys)`, or `(batch, 1, queries, keys)` with
            True or 0 where a key is seen.
        cache: the keys and values so far, those of the present tokens included, or None.

    Returns:
        Two tensors `(batch or 1, tokens)`; a padded token is far from either end.
    """
    if mask is None:
        before = cache.get_seq_length() - tokens if cache is not None else 0
        steps = torch.arange(tokens, device=device)[None]
        return steps + max(0, before), tokens - 1 - steps
    seen = mask if mask.dtype == torch.bool else mask > (0 if mask.dim() == 2 else -1)
    queries, keys = (1, seen.shape[1]) if mask.dim() == 2 else seen.shape[-2:]
    if queries == tokens != keys:  # later tokens of a generation: each sees all before it
        start = seen[:, 0].sum(-1) - 1
        return start, start[:, -1:] - start
    real = seen if mask.dim() == 2 else _real(seen[:, 0])
    order = real.cumsum(-1)
    start, end = order - 1, order[:, -1:] - order
    padded = ~real
    return start.masked_fill(padded, _FAR)[:, -tokens:], end.masked_fill(padded, _FAR)[:, -tokens:]


def _real(seen: Tensor) -> Tensor:
    """Return which keys are no padding: those that see themselves, or that all may see."""
    return seen.diagonal(dim1=-2, dim2=-1) if seen.shape[-2] == seen.shape[-1] else seen[:, -1]


def _check_gradients(model: nn.Module, chosen: Sequence[tuple[str, nn.Module]]) -> None:
    for parent in recomputing(model):
        if {id(block) for _, block in chosen} & {id(m) for m in parent.modules()}:
            raise TargetError(
                f"{type(parent).__name__} runs its layers backwards by itself, past what is edited "
                f"behind them, so no edit would learn: take a method that changes the weights "
                f"inside them, such as `LoRA`."
            )


def _last_called(model: nn.Module, name: str, block: nn.Module) -> tuple[str, nn.Module]:
    """Return a block, or the last of its children where its own hooks are not run.

    Some only run their children one by one, and of some `forward` is called by its name.
    """
    parent = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
    unasked = calls_forward(cast(type, type(parent)))
    while unasked or _only_runs_children(block):
        key, block = list(block.named_children())[-1]
        name, unasked = f"{name}.{key}", False
    return name, block


def _only_runs_children(block: nn.Module) -> bool:
    if isinstance(block, nn.Sequential | nn.ModuleList):
        return True
    children = list(block.children())
    is_list = len(children) == 1 and isinstance(children[0], nn.ModuleList)
    # The blocks of T5 hold a list too, but are given masks and caches beside the states.
    return is_list and len(inspect.signature(type(block).forward).parameters) == 2


def _width(block: nn.Module, output: nn.Module | None, said: Any) -> int:
    if isinstance(output, sublayers.CONVOLUTIONS):
        return sublayers.fan(output)[1]
    return sublayers.stream_width(block, said)
