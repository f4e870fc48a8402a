"""AdapterFusion: attention over trained adapters (Pfeiffer et al. 2021, https://arxiv.org/abs/2005.00247).

    s = softmax_n((Q h) · (K z_n)),    y = h + V Σ_n s_n z_n

Behind each module that carries bottleneck adapters: h is what the module computes, z_n what adapter
n would add to it. Only Q, K and V are trained: the adapters stay what they are, and each place of a
text chooses among what they know.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.carrying.registry import adapters_of
from lightning_peft.carrying.state import DEPENDS_ON
from lightning_peft.delta import SLOT, Delta, slot_of
from lightning_peft.deltas.low_rank import fresh
from lightning_peft.errors import AdapterError, ConfigError, TargetError, near_misses
from lightning_peft.method import Method
from lightning_peft.methods.bottleneck import Bottleneck, BottleneckAdapter
from lightning_peft.structure.anatomy import base_modules


@dataclass(frozen=True, kw_only=True)
class AdapterFusion(Method):
    """Attention over the bottleneck adapters that the model carries.

    Train and load them first, one by one; they may have been trained on other tasks.

    Raises:
        ConfigError: an adapter is named twice.
    """

    kind: ClassVar[str] = "fusion"
    starts_as_base: ClassVar[bool] = False
    builds_on_adapters: ClassVar[bool] = True

    adapters: Sequence[str] = ()
    """Names of the adapters to fuse, which the model carries; empty fuses all that it carries."""

    dropout: float = 0.0
    """Probability with which the share of an adapter is zeroed in training."""

    def __post_init__(self) -> None:
        if len(set(self.adapters)) < len(self.adapters):
            raise ConfigError(f"`adapters` must name each once, but is {list(self.adapters)}.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"`dropout` must lie in [0, 1), but is {self.dropout} instead.")

    def deltas(self, model: nn.Module) -> dict[str, Delta]:
        """Return a fusion for each module that carries one of the adapters.

        Raises:
            TargetError: the model carries no such adapter.
            AdapterError: an adapter is none of bottlenecks.
        """
        keys = self._keys(model)
        deltas: dict[str, Delta] = {}
        for name, host in base_modules(model):
            carried = [key for key in keys if SLOT in host._modules and key in slot_of(host)]
            if any(isinstance(slot_of(host)[key], Bottleneck) for key in carried):
                deltas[name] = Fusion(host, carried, self.dropout)
            elif carried:
                deltas[name] = Relay(carried)
        return deltas

    def _keys(self, model: nn.Module) -> list[str]:
        present = adapters_of(model)
        for name in self.adapters:
            if name not in present:
                raise TargetError(
                    f"The model carries no adapter `{name}` to fuse: load it first."
                    f"{near_misses(name, present)}"
                )
        chosen = {n: a for n, a in present.items() if n in self.adapters or not self.adapters}
        chosen = {n: a for n, a in chosen.items() if self not in a.methods}
        if not chosen:
            raise TargetError(
                "The model carries no adapters to fuse: train bottleneck adapters, load them with "
                "`load_adapter`, then inject their fusion."
            )
        return [f"{name}_{_kind(name, adapter.methods)}" for name, adapter in chosen.items()]


def _kind(name: str, methods: Sequence[Method]) -> str:
    kinds = [method.kind for method in methods]
    if len(methods) != 1 or not isinstance(methods[0], BottleneckAdapter):
        raise AdapterError(
            f"`adapters` must name bottleneck adapters, but `{name}` is of {', '.join(kinds)} "
            "instead: choose the others by name."
        )
    return kinds[0]


class Relay(Delta):
    """Lets parallel adapters see what their sub-layer receives, where that is another module."""

    def __init__(self, keys: Sequence[str]) -> None:
        super().__init__()
        self.keys = tuple(keys)

    def before(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Leave the inputs as they are and show them."""
        for key in self.keys:
            _carried(host, key).before(host, args, kwargs)
        return args, kwargs


class Fusion(Delta):
    """Attention over what the adapters of one host would add.

    Shapes: `query`, `key` and `value` `(width, width)`; output `(..., width)`, of a convolution
    `(batch, width, ...)`. For each adapter a buffer of 32 bytes, `depends_on_<name>`, is the
    SHA-256 of what it has at this host, so that a saved fusion meets no others.
    """

    def __init__(self, host: nn.Module, keys: Sequence[str], dropout: float) -> None:
        super().__init__()
        self.keys, self.dropout = tuple(keys), dropout
        first = next(d for d in (_carried(host, k) for k in keys) if isinstance(d, Bottleneck))
        self.channels_first, width = first.channels_first, len(first.up)
        self.query, self.key, self.value = (
            nn.Parameter(fresh(first.up, (width, width))) for _ in range(3)
        )
        for key in self.keys:
            digest = _digest(_carried(host, key))
            buffer = torch.tensor(list(digest), dtype=torch.uint8, device=first.up.device)
            self.register_buffer(f"{DEPENDS_ON}{key.rpartition('_')[0]}", buffer)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Q and K start at random and small, V as the identity: about the adapters' mean."""
        nn.init.normal_(self.query, std=0.02)
        nn.init.normal_(self.key, std=0.02)
        nn.init.eye_(self.value)

    def forward(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Return the output, and what is beside it in a tuple, with the mixed change added."""
        if isinstance(output, tuple | list):
            return type(output)((self.forward(host, args, kwargs, output[0]), *output[1:]))
        changed = [_carried(host, key)(host, args, kwargs, output) for key in self.keys]
        changes = torch.stack([each - output for each in changed], -1)
        if self.channels_first:
            mixed = self._mixed(output.movedim(1, -1), changes.movedim(1, -2)).movedim(-1, 1)
        else:
            mixed = self._mixed(output, changes)
        return output + mixed.to(output.dtype)

    def _mixed(self, h: Tensor, z: Tensor) -> Tensor:
        """Return the change for outputs `(..., width)` from changes `(..., width, adapters)`."""
        query, key, value = (w.to(h.dtype) for w in (self.query, self.key, self.value))
        asked = F.linear(F.linear(h, query), key.T)  # Kᵀ Q h: one product, whatever their number
        shares = F.dropout((asked.unsqueeze(-2) @ z).softmax(-1), self.dropout, self.training)
        return F.linear((z * shares).sum(-1), value)


def _digest(delta: Delta) -> bytes:
    found = hashlib.sha256()
    for name, tensor in sorted(delta.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)}\n".encode())
        if not tensor.is_meta:
            values = tensor.to("cpu", torch.float32).flatten()
            found.update(values.view(torch.uint8).numpy().tobytes())
    return found.digest()


def _carried(host: nn.Module, key: str) -> Delta:
    slot: Mapping[str, nn.Module] = slot_of(host)._modules
    if key not in slot:
        raise AdapterError(
            f"`{key.rpartition('_')[0]}` is fused, but no longer in the model: load it again, or "
            "remove the fusion."
        )
    return cast(Delta, slot[key])
