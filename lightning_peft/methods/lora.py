"""LoRA: low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    y = W x + b + s · B A x,    A ∈ R^(r × in),  B ∈ R^(out × r),  s = alpha / r

With `rslora` (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732) s = alpha / √r.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.anatomy import is_conv1d, is_linear
from lightning_peft.delta import Delta, NotMergeable
from lightning_peft.errors import ConfigError, TargetError, near_misses
from lightning_peft.method import Method
from lightning_peft.ops.low_rank import add_low_rank
from lightning_peft.targets import Patterns, Targets, as_targets, matches

_ADAPTABLE = "Linear, Conv1D, Embedding, Conv1d and Conv2d"


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Low-rank adaptation of linear layers, `Conv1D`, embeddings and convolutions.

    Raises:
        ConfigError: a setting is out of its range.
    """

    kind: ClassVar[str] = "lora"

    r: int = 8
    """Rank of the change; parameters grow with it in proportion."""

    alpha: float = 16
    """Strength of the change: it is scaled by alpha / r."""

    dropout: float = 0.0
    """Probability with which an input of A is zeroed during training."""

    targets: Targets | Patterns | None = None
    """Which modules: None (the layers' linear projections), patterns, or "all-linear"."""

    rslora: bool = False
    """Scale by alpha / sqrt(r), which keeps high ranks (64 and more) learning."""

    bias: Literal["none", "lora", "all"] = "none"
    """Which biases of the base to train too: none, those of the targets, or all."""

    layers: Sequence[int] | None = None
    """Indices of the layers to adapt (negative ones count from the top); None adapts all."""

    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Other ranks for modules by pattern; the first match wins."""

    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Other alphas for modules by pattern; the first match wins."""

    def __post_init__(self) -> None:
        if wrong := [r for r in (self.r, *self.rank_pattern.values()) if r < 1]:
            raise ConfigError(f"`r` must be at least 1, but is {wrong[0]} instead.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"`dropout` must lie in [0, 1), but is {self.dropout} instead.")
        if self.bias not in ("none", "lora", "all"):
            raise ConfigError(f"`bias` must be none, lora or all, but is {self.bias!r} instead.")

    def deltas(self, model: nn.Module) -> dict[str, Delta]:
        """Return a low-rank delta for each target."""
        hosts = self._hosts(model)
        if patterns := (*self.rank_pattern, *self.alpha_pattern):
            _check_patterns(patterns, hosts)
        return {name: self._delta(name, host) for name, host in hosts.items()}

    def in_place(self, model: nn.Module) -> list[str]:
        """Return the biases to train, as `bias` says."""
        return [] if self.bias == "none" else self._biases(model)

    def _biases(self, model: nn.Module) -> list[str]:
        roots = tuple(self._hosts(model))
        biases = [n for n, _ in model.named_parameters() if n.rpartition(".")[2] == "bias"]
        return [n for n in biases if self.bias == "all" or n.rpartition(".")[0] in roots]

    def _hosts(self, model: nn.Module) -> dict[str, nn.Module]:
        return as_targets(self.targets, self.layers).find(model, can_adapt, _ADAPTABLE)

    def _delta(self, name: str, host: nn.Module) -> "LowRank":
        r = _first(self.rank_pattern, name, self.r)
        alpha = _first(self.alpha_pattern, name, self.alpha)
        return low_rank(host, r, alpha / (math.sqrt(r) if self.rslora else r), self.dropout)


class LowRank(Delta):
    """A low-rank change of one host, of kind Linear or `Conv1D`.

    Shapes: input `(..., in)`, `lora_A` `(r, in)`, `lora_B` `(out, r)`, output `(..., out)`.
    """

    def __init__(self, host: Any, r: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        a, b = (_fresh(host.weight, shape) for shape in self.shapes(host, r))
        self.lora_A, self.lora_B = nn.Parameter(a), nn.Parameter(b)
        self.scale, self.dropout = scale, nn.Dropout(dropout) if dropout else None
        self.reset_parameters()

    def shapes(self, host: Any, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B for a host."""
        into, out = host.weight.shape if is_conv1d(host) else (host.in_features, host.out_features)
        return (r, into), (out, r)

    def reset_parameters(self) -> None:
        """A is uniform as in a fresh Linear layer, B is zero: the change starts at nothing."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Return `output + scale · B A x`."""
        return add_low_rank(output, self._input(args, kwargs), self.lora_A, self.lora_B, self.scale)

    def change(self) -> Tensor:
        """Return the change of the weight, `(out, in)`."""
        return self.scale * (self.lora_B @ self.lora_A)

    def merge(self, module: nn.Module) -> None:
        """Add the change to the host's weight, which gets new storage."""
        weight = module.weight
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise NotMergeable(f"The weight of {type(module).__name__} is quantised.")
        change = self.change().detach()
        change = change.T if is_conv1d(module) else change
        weight.data = (weight.data + change).to(weight.dtype)

    def _input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        return self.dropout(x) if self.dropout else x


class EmbeddingLowRank(LowRank):
    """A low-rank change of an embedding table.

    Shapes: ids `(...)`, `lora_A` `(r, vocabulary)`, `lora_B` `(d_model, r)`, output
    `(..., d_model)`.
    """

    def __init__(self, host: Any, r: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(host, r, scale)  # ids cannot be dropped
        # Some tables (BART, Gemma) multiply their rows.
        self.output_scale = float(getattr(host, "embed_scale", None) or 1.0)
        self.padding_idx = host.padding_idx

    def shapes(self, host: Any, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B for a host."""
        return (r, host.num_embeddings), (host.embedding_dim, r)

    def reset_parameters(self) -> None:
        """A is zero and B is normal: the change starts at nothing, as peft has it for tables."""
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    def forward(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Return `output + scale · B A[ids]`."""
        rows = F.embedding(self._input(args, kwargs), self.lora_A.T, self.padding_idx)
        change = F.linear(rows, self.lora_B) * (self.scale * self.output_scale)
        return output + change.to(output.dtype)

    def merge(self, module: nn.Module) -> None:
        """Add the change to the table, `(vocabulary, d_model)`."""
        weight = cast(Tensor, module.weight)
        weight.data = (weight.data + self.change().detach().T).to(weight.dtype)


class ConvolutionLowRank(LowRank):
    """A low-rank change of a convolution: one to r channels, then one of extent 1.

    Shapes: `lora_A` `(r, in, *kernel)`, `lora_B` `(out, r / groups, 1, ...)`.
    """

    def __init__(self, host: Any, r: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(host, r, scale, dropout)
        self.stride, self.dilation, self.groups = host.stride, host.dilation, host.groups
        self.padding, self.padding_mode = host.padding, host.padding_mode
        self.edges = host._reversed_padding_repeated_twice

    def shapes(self, host: Any, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B for a host.

        Raises:
            ConfigError: the rank is not divisible by the groups.
        """
        if r % host.groups:
            raise ConfigError(f"`r` must be divisible by {host.groups} groups, but is {r} instead.")
        ones = (1,) * len(host.kernel_size)
        b = (host.out_channels, r // host.groups, *ones)
        return (r, host.in_channels, *host.kernel_size), b

    def forward(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Return `output + scale · B * (A * x)`."""
        x, padding = self._input(args, kwargs), self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self.edges, mode=self.padding_mode), 0
        convolve = F.conv1d if self.lora_A.dim() == 3 else F.conv2d
        a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        hidden = convolve(x, a, None, self.stride, padding, self.dilation)
        change: Tensor = convolve(hidden, b, groups=self.groups) * self.scale
        return output + change.to(output.dtype)

    def change(self) -> Tensor:
        """Return the change of the kernel, `(out, in, *kernel)`."""
        flat = self.lora_B.flatten(1) @ self.lora_A.flatten(1)
        return self.scale * flat.view(len(flat), *self.lora_A.shape[1:])

    def merge(self, module: nn.Module) -> None:
        """Add the change to the kernel.

        Raises:
            NotMergeable: the host convolves in groups, the change does not.
        """
        if self.groups > 1:
            raise NotMergeable(f"A convolution in {self.groups} groups cannot hold the change.")
        super().merge(module)


def can_adapt(module: nn.Module) -> bool:
    """Whether LoRA can change what the module computes."""
    return is_linear(module) or isinstance(module, tuple(_SPECIAL))


def low_rank(host: nn.Module, r: int, scale: float, dropout: float) -> LowRank:
    """Return the low-rank delta for `host`."""
    cls = next((cls for kind, cls in _SPECIAL.items() if isinstance(host, kind)), LowRank)
    return cls(host, r, scale, dropout)


def _fresh(w: Tensor, shape: Sequence[int]) -> Tensor:
    # Master copies: never narrower than float32, whatever the base is stored in.
    return torch.empty(shape, dtype=torch.promote_types(w.dtype, torch.float32), device=w.device)


def _check_patterns(patterns: Sequence[str], hosts: Mapping[str, nn.Module]) -> None:
    for pattern in patterns:
        if not any(matches(pattern, name) for name in hosts):
            close = near_misses(pattern, {name.rpartition(".")[2] for name in hosts})
            raise TargetError(f"`{pattern}` in a pattern of LoRA matches no target.{close}")


def _first(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((value for p, value in patterns.items() if matches(p, name)), default)


_SPECIAL: dict[type[nn.Module], type[LowRank]] = {
    nn.Embedding: EmbeddingLowRank,
    nn.Conv1d: ConvolutionLowRank,
    nn.Conv2d: ConvolutionLowRank,
}
"""The kinds of host that are not linear."""
