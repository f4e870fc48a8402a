"""Bottleneck adapters: a small network with a residual connection behind a sub-layer.

    h ← h + s · U f(D x + d) + u',    D ∈ R^(size × width),  U ∈ R^(width × size)

h is what the sub-layer's output projection gives, before the residual sum. Of a sequential adapter
x = h (Houlsby et al. 2019, https://arxiv.org/abs/1902.00751, behind attention and feed-forward;
Pfeiffer et al. 2021, https://arxiv.org/abs/2005.00247, behind the feed-forward only). Of a parallel
one x is what the feed-forward receives (He et al. 2022, https://arxiv.org/abs/2110.04366). The
lowest layers may go without, and adapters may be dropped in training (AdapterDrop, Rücklé et al.
2021, https://arxiv.org/abs/2010.11918). A gate scales the change (UniPELT, Mao et al. 2022,
https://arxiv.org/abs/2110.07577).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.delta import Delta
from lightning_peft.deltas.low_rank import check_finite
from lightning_peft.deltas.passing import first_input, new_key, show, shown
from lightning_peft.errors import ConfigError, TargetError
from lightning_peft.method import Method
from lightning_peft.ops.bottleneck import ACTIVATIONS, Gating, bottleneck, check_gating, gated
from lightning_peft.structure import sublayers
from lightning_peft.structure.anatomy import is_linear, layers
from lightning_peft.structure.sublayers import CONVOLUTIONS, SubLayer
from lightning_peft.structure.targets import Patterns, Targets

_NARROWEST = 8
"""Fewer units may all be dead at the start, and then never learn."""


@dataclass(frozen=True, kw_only=True)
class BottleneckAdapter(Method):
    """Bottleneck adapters behind the sub-layers of every layer.

    Raises:
        ConfigError: a setting is out of its range.
    """

    kind: ClassVar[str] = "bottleneck"

    placement: Literal["pfeiffer", "houlsby", "parallel"] = "pfeiffer"
    """Where: behind each feed-forward, behind attention too, or parallel to the feed-forward."""

    size: int | None = None
    """Width of the bottleneck; None divides the layer's width by `reduction_factor`."""

    reduction_factor: float = 16
    """How much narrower than the layer the bottleneck is, 8 at least, where `size` is None."""

    activation: str = "relu"
    """The non-linearity: relu, gelu, silu, tanh, sigmoid, leaky_relu or identity."""

    scaling: float | Literal["learned"] = 1.0
    """Factor of the change, or "learned": a trained one that starts at 1."""

    dropout: float = 0.0
    """Probability with which an element of the change is zeroed during training."""

    layer_norm: bool = False
    """Normalise what the bottleneck receives, with a trained LayerNorm."""

    gating: Gating | None = None
    """Scale the change by a trained gate, for each token or averaged over the sequence."""

    leave_out: int = 0
    """How many of the lowest layers get no adapter."""

    layer_drop: float = 0.0
    """Probability with which a whole adapter is left out of a training step."""

    targets: Patterns | None = None
    """Patterns of the modules to put adapters behind; None lets the model's structure decide."""

    def __post_init__(self) -> None:
        if self.placement not in ("pfeiffer", "houlsby", "parallel"):
            raise ConfigError(
                "`placement` must be pfeiffer, houlsby or parallel, but is "
                f"{self.placement!r} instead."
            )
        if (self.size is not None and self.size < 1) or self.reduction_factor <= 0:
            raise ConfigError(
                "`size` must be at least 1 and `reduction_factor` positive, but they are "
                f"{self.size} and {self.reduction_factor} instead."
            )
        if self.activation not in ACTIVATIONS:
            raise ConfigError(
                f"`activation` must be one of {', '.join(ACTIVATIONS)}, but is "
                f"{self.activation!r} instead."
            )
        self._check_training()

    def _check_training(self) -> None:
        for name in ("dropout", "layer_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(
                    f"`{name}` must lie in [0, 1), but is {getattr(self, name)} instead."
                )
        if isinstance(self.scaling, str) and self.scaling != "learned":
            raise ConfigError(
                f'`scaling` must be a number or "learned", but is {self.scaling!r} instead.'
            )
        if not isinstance(self.scaling, str):
            check_finite(scaling=self.scaling)
        check_gating(self.gating)
        if self.leave_out < 0:
            raise ConfigError(f"`leave_out` must not be negative, but is {self.leave_out} instead.")
        if self.targets is not None and (self.placement != "pfeiffer" or self.leave_out):
            raise ConfigError(
                "`targets` must be None where `placement` or `leave_out` choose the modules, but "
                f"is {self.targets!r} instead."
            )

    def deltas(self, model: nn.Module) -> dict[str, Delta]:
        """Return an adapter for each sub-layer that `placement` or `targets` name."""
        if self.targets is not None:
            hosts = Targets(self.targets).find(model, _has_width, "linear layers and convolutions")
            return {n: self._adapter(m, sublayers.fan(m)[1]) for n, m in hosts.items()}
        widths = [sublayers.stream_width(block) for _, block in layers(model)]
        deltas: dict[str, Delta] = {}
        for found in self._sublayers(model):
            if self.placement == "parallel":
                deltas |= self._parallel(found, widths[found.layer])
            else:
                name, host = found.output
                deltas[name] = self._adapter(host, _width(host, widths[found.layer]))
        return deltas

    def _sublayers(self, model: nn.Module) -> list[SubLayer]:
        every = self.placement == "houlsby"
        found = sublayers.sublayers(model) if every else sublayers.feed_forwards(model)
        if self.placement == "parallel":
            found = [s for s in found if not isinstance(s.exit[1], CONVOLUTIONS)]
        kept = [s for s in found if s.layer >= self.leave_out]
        if not kept:
            raise TargetError(_nothing(model, len(found), self))
        return kept

    def _parallel(self, found: SubLayer, width: int) -> dict[str, Delta]:
        (entry, host), (exit_, last) = found.entry, found.exit
        adapter = self._adapter(last, _width(last, width))
        adapter.reads_input = True
        if host is last:
            return {exit_: adapter}
        adapter.tapped = (tap := Tap()).key
        return {entry: tap, exit_: adapter}

    def _adapter(self, host: nn.Module, width: int) -> "Bottleneck":
        size = self.size or max(_NARROWEST, round(width / self.reduction_factor))
        return Bottleneck(host, width, size, self)


class Bottleneck(Delta):
    """The adapter behind one host.

    Shapes: input and output `(..., width)`, of a convolution `(batch, width, ...)`; `down`
    `(size, width)`, `up` `(width, size)`, `gate` `(1, width)`, `scale` `(1,)`.
    """

    reads_input = False
    """Whether it changes the output by what the sub-layer receives, instead of by itself."""

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    norm: Tensor
    norm_bias: Tensor
    gate: Tensor
    gate_bias: Tensor
    scale: Tensor

    tapped: str | None = None
    """The key of the `Tap` on the sub-layer's input, where that is another module's."""

    def __init__(self, host: nn.Module, width: int, size: int, settings: BottleneckAdapter) -> None:
        super().__init__()
        shapes: dict[str, tuple[int, ...]] = {
            "down": (size, width),
            "down_bias": (size,),
            "up": (width, size),
            "up_bias": (width,),
        }
        if settings.layer_norm:
            shapes |= {"norm": (width,), "norm_bias": (width,)}
        if settings.gating:
            shapes |= {"gate": (1, width), "gate_bias": (1,)}
        if settings.scaling == "learned":
            shapes["scale"] = (1,)
        for name, fresh in _fresh(host, shapes).items():
            self.register_parameter(name, nn.Parameter(fresh))
        self.settings = settings
        self.channels_first = isinstance(host, CONVOLUTIONS)
        self.train(host.training)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """D is uniform as in a fresh Linear layer, U and the biases are zero: nothing changes."""
        for name, parameter in self.named_parameters():
            (nn.init.ones_ if name in ("norm", "scale") else nn.init.zeros_)(parameter)
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        if self.settings.gating:
            nn.init.normal_(self.gate, std=0.02)

    def forward(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Return the output, and what is beside it in a tuple, with the change added."""
        if isinstance(output, tuple | list):
            return type(output)((self.forward(host, args, kwargs, output[0]), *output[1:]))
        x = self._input(args, kwargs) if self.reads_input else output
        return output if x is None else self._add(output, x)

    def _input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        if self.tapped is None:
            return first_input(args, kwargs)
        return cast(Tensor | None, shown(self.tapped, keep=False))

    def _add(self, h: Tensor, x: Tensor) -> Tensor:
        if self.channels_first:
            return h + self._change(x.movedim(1, -1)).movedim(-1, 1).to(h.dtype)
        change = self._change(x).to(h.dtype)
        # Some experts give all sequences' tokens in one list (Llama 4), here those of the input.
        return h + (change if change.dim() == h.dim() else change.reshape(h.shape))

    def _change(self, x: Tensor) -> Tensor:
        settings, z = self.settings, x
        if settings.layer_norm:
            z = F.layer_norm(x, x.shape[-1:], self.norm.to(x.dtype), self.norm_bias.to(x.dtype))
        activation = ACTIVATIONS[settings.activation]
        change = bottleneck(z, self.down, self.down_bias, self.up, self.up_bias, activation)
        if isinstance(settings.scaling, str):
            change = change * self.scale.to(change.dtype)
        elif settings.scaling != 1:
            change = change * settings.scaling
        change = F.dropout(change, settings.dropout, self.training)
        if settings.gating:
            change = gated(change, x, self.gate, self.gate_bias, settings.gating)
        if settings.layer_drop and self.training:
            change = change * (torch.rand(1, device=x.device) >= settings.layer_drop)
        return change


class Tap(Delta):
    """Shows what a module receives to the parallel adapter at the end of the same sub-layer."""

    def __init__(self) -> None:
        super().__init__()
        self.key = new_key()

    def before(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Leave the inputs as they are and note the first."""
        show(self.key, args, kwargs)
        return args, kwargs


def _has_width(module: nn.Module) -> bool:
    return is_linear(module) or isinstance(module, CONVOLUTIONS)


def _width(host: nn.Module, width: int) -> int:
    return sublayers.fan(host)[1] if _has_width(host) else width


def _fresh(host: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    # Master copies: never narrower than float32, whatever the base is stored in.
    like = next(p for p in host.parameters() if p.is_floating_point())
    dtype = torch.promote_types(like.dtype, torch.float32)
    return {n: torch.empty(shape, dtype=dtype, device=like.device) for n, shape in shapes.items()}


def _nothing(model: nn.Module, found: int, method: BottleneckAdapter) -> str:
    name = type(model).__name__
    if found:
        return (
            f"`leave_out` must be less than {len(layers(model))}, the layers of {name}, but is "
            f"{method.leave_out} instead."
        )
    if not layers(model):
        return (
            f"{name} has no stack of layers to put adapters into: name the modules to put them "
            'behind, such as `targets="fc2"`.'
        )
    return (
        f"No feed-forward of width-preserving layers was found in {name} for a "
        f"{method.placement} adapter: name the modules to put adapters behind with `targets`."
    )
