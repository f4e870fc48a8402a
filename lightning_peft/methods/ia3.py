"""IA3: learned vectors scale activations (Liu et al. 2022, https://arxiv.org/abs/2205.05638).

    K = l_k ∘ (W_k x),    V = l_v ∘ (W_v x),    FF(x) = W_2 (l_ff ∘ f(W_1 x))

Vectors start at one. A layer that projects onto queries, keys and values together has its whole
output scaled: what scales a query's channel scales the product with the same channel of the key.
"""

from abc import ABC
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.delta import Delta, NotMergeable
from lightning_peft.errors import TargetError
from lightning_peft.method import Method
from lightning_peft.structure import anatomy, sublayers
from lightning_peft.structure.anatomy import Named, is_conv1d, is_linear
from lightning_peft.structure.sublayers import CONVOLUTIONS
from lightning_peft.structure.targets import Patterns, Targets, layer_roots

_ADAPTABLE = "Linear, Conv1D and Conv2d"


@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """Learned vectors that scale keys, values and the feed-forward's inner activations."""

    kind: ClassVar[str] = "ia3"

    keys_values: Patterns | None = None
    """What has its output scaled: None (projections onto keys and values), or patterns; () none."""

    feed_forward: Patterns | None = None
    """What has its input scaled: None (the last layer of each feed-forward), or patterns."""

    layers: Sequence[int] | None = None
    """Indices of the layers to adapt (negative ones count from the top); None adapts all."""

    def deltas(self, model: nn.Module) -> dict[str, Delta]:
        """Return a vector for each projection onto keys or values, and for each feed-forward.

        Raises:
            TargetError: the model has neither, or a pattern matches nothing.
        """
        inputs = self._hosts(model, self.feed_forward, list(_inner(model)))
        outputs = self._hosts(model, self.keys_values, list(_keys_values(model)))
        deltas = {name: _of_input(model, name, host) for name, host in inputs}
        deltas |= {name: _of_output(host) for name, host in outputs}
        if not deltas:
            raise TargetError(
                f"{type(model).__name__} has no projection onto keys or values, and no layer of a "
                "feed-forward, that a vector could scale: name the modules with `keys_values` or "
                "`feed_forward`."
            )
        return deltas

    def _hosts(
        self, model: nn.Module, patterns: Patterns | None, found: list[Named]
    ) -> list[Named]:
        if patterns is not None:
            chosen = Targets(patterns, layers=self.layers) if patterns else None
            return list(chosen.find(model, _scales, _ADAPTABLE).items()) if chosen else []
        if self.layers is None:
            return found
        roots = layer_roots(model, self.layers)
        return [(n, m) for n, m in found if n.startswith(roots)]


class Vector(Delta, ABC):
    """A vector that starts at one.

    Shapes: `scale` `(width,)`; of a convolution `(width, 1, ...)`.
    """

    def __init__(self, like: Tensor, shape: Sequence[int]) -> None:
        super().__init__()
        # Master copies: never narrower than float32, whatever the base is stored in.
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.scale = nn.Parameter(torch.ones(tuple(shape), dtype=dtype, device=like.device))

    def reset_parameters(self) -> None:
        """The vector is one: nothing changes."""
        nn.init.ones_(self.scale)

    def times(self, x: Tensor) -> Tensor:
        """Return `l ∘ x`."""
        scale = self.scale.to(x.dtype)
        # What `nn.TransformerEncoder` makes of a padded batch in eval mode only knows matrices.
        return F.linear(x, torch.diag(scale)) if x.is_nested else x * scale


class ScaledOutput(Vector):
    """Scales what its host gives."""

    def forward(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Return `l ∘ output`."""
        return self.times(output)

    def merge(self, module: nn.Module) -> None:
        """Scale the rows of the host's weight, and its bias."""
        rows = self.scale.detach().flatten()
        _multiply(module, rows if is_conv1d(module) else rows.view(-1, *_ones(module)))
        if isinstance(bias := module._parameters.get("bias"), Tensor):
            bias.data = (bias.data * rows).to(bias.dtype)


class ScaledInput(Vector):
    """Scales what its host receives."""

    def before(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Return `l ∘ x` in place of the first input."""
        if args:
            return (self.times(args[0]), *args[1:]), kwargs
        name, x = next(iter(kwargs.items()))
        return args, kwargs | {name: self.times(x)}

    def merge(self, module: nn.Module) -> None:
        """Scale the columns of the host's weight."""
        if getattr(module, "groups", 1) > 1:
            raise NotMergeable(f"A {type(module).__name__} in groups cannot hold a scaled input.")
        scale = self.scale.detach()
        _multiply(module, scale.view(-1, 1) if is_conv1d(module) else scale)


class ScaledWeight(Vector):
    """Scales a weight that a module reads without calling a layer, along one axis.

    Shapes: `scale` `(experts, 1, inner)` of fused experts (or `(experts, inner, 1)`, as they keep
    their weight), `(2 · d_model, 1)` of the keys' and values' rows of `nn.MultiheadAttention`.
    """

    def __init__(self, weight: Tensor, name: str, shape: Sequence[int]) -> None:
        super().__init__(weight, shape)
        self.weight_name, self.bias_name = name, name.replace("weight", "bias")

    def reweigh(self, host: nn.Module, name: str, weight: Tensor) -> Tensor:
        """Return `l ∘ W`, and of keys and values `l ∘ b`."""
        if name not in (self.weight_name, self.bias_name):
            return weight
        scale = self.scale.to(weight.dtype)
        if missing := weight.shape[0] - len(scale):  # the rows of queries stay
            scale = torch.cat([scale.new_ones(missing, 1), scale])
        return weight * (scale if weight.dim() == scale.dim() else scale[:, 0])

    def merge(self, module: nn.Module) -> None:
        """Scale the weight, and the bias."""
        for name in {self.weight_name, self.bias_name}:
            if isinstance(tensor := module._parameters.get(name), Tensor):
                tensor.data = self.reweigh(module, name, tensor.data).detach()


def _keys_values(model: nn.Module) -> Iterator[Named]:
    for sublayer in sublayers.sublayers(model):
        if anatomy.is_attention(sublayer.entry[1]):
            yield from sublayers.keys_and_values(sublayer.entry)


def _inner(model: nn.Module) -> Iterator[Named]:
    widths = [sublayers.stream_width(block) for _, block in anatomy.layers(model)]
    for found in sublayers.sublayers(model):
        if not anatomy.is_attention(found.entry[1]):
            yield from sublayers.last_projections(found, widths[found.layer])


def _of_output(host: nn.Module) -> Delta:
    if isinstance(host, nn.MultiheadAttention):
        weight = host.in_proj_weight
        if weight is None:
            return ScaledWeight(host.v_proj_weight, "v_proj_weight", (len(host.v_proj_weight), 1))
        return ScaledWeight(weight, "in_proj_weight", (len(weight) // 3 * 2, 1))
    return ScaledOutput(_like(host), (sublayers.fan(host)[1], *_spatial(host)))


def _of_input(model: nn.Module, name: str, host: nn.Module) -> Delta:
    names = [n for n in anatomy.read_weights(host) if cast(Tensor, getattr(host, n)).dim() == 3]
    if names:
        weight, width = cast(Tensor, getattr(host, names[-1])), _width_around(model, name)
        stack, rows, columns = weight.shape
        shape = (stack, 1, columns) if rows == width else (stack, rows, 1)
        return ScaledWeight(weight, names[-1], shape)
    return ScaledInput(_like(host), (sublayers.fan(host)[0], *_spatial(host)))


def _width_around(model: nn.Module, name: str) -> int:
    blocks = [m for n, m in anatomy.layers(model) if anatomy.under(name, (n,))]
    return sublayers.stream_width(blocks[0]) if blocks else 0


def _scales(module: nn.Module) -> bool:
    return is_linear(module) or isinstance(module, CONVOLUTIONS)


def _like(host: nn.Module) -> Tensor:
    return cast(Tensor, host.weight)


def _spatial(host: nn.Module) -> tuple[int, ...]:
    return (1,) * (_like(host).dim() - 2) if isinstance(host, CONVOLUTIONS) else ()


def _ones(host: nn.Module) -> tuple[int, ...]:
    return (1,) * (_like(host).dim() - 1)


def _multiply(module: nn.Module, scale: Tensor) -> None:
    weight = _like(module)
    if not weight.is_floating_point():
        raise NotMergeable(f"The weight of {type(module).__name__} is quantised.")
    weight.data = (weight.data * scale).to(weight.dtype)
