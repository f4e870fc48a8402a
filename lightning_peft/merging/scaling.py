"""How much of an adapter is applied: between the base (0) and what was trained (1), or beyond.

    y = y_base + s · (y_trained - y_base)

at each module that the adapter changes. For a change of a weight this is W + s ΔW, as in task
arithmetic (Ilharco et al. 2023, https://arxiv.org/abs/2212.04089) and WiSE-FT (Wortsman et al.
2022, https://arxiv.org/abs/2109.01903): less of the domain, more of what the base could do, or
negative to unlearn. It is a setting of the running model: no file and no checkpoint holds it.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lightning_peft.delta import Delta, NotMergeable, slot_of
from lightning_peft.errors import AdapterError
from lightning_peft.ops.blend import blend

if TYPE_CHECKING:
    from lightning_peft.adapter import Adapter


class Part(Delta):
    """As much of another delta's change as is applied; it stands in for it among what acts."""

    delta: Delta

    def __init__(self, delta: Delta) -> None:
        super().__init__()
        self.__dict__["delta"] = delta  # which stays a child of its slot alone

    def before(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Return the inputs, changed in part."""
        changed = self._share((args, kwargs), lambda: self.delta.before(host, args, kwargs))
        return cast(tuple[Any, dict[str, Any]], changed)

    def forward(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Return the output, changed in part."""
        return self._share(output, lambda: self.delta(host, args, kwargs, output))

    def reweigh(self, host: nn.Module, name: str, weight: Tensor) -> Tensor:
        """Return a weight, changed in part."""
        return cast(Tensor, self._share(weight, lambda: self.delta.reweigh(host, name, weight)))

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
        """Return what attention gives, changed in part; the weights are those of the change."""
        plain = base(host, query, key, value, mask, **kwargs)
        if not self.delta.strength or type(self.delta).attend is Delta.attend:
            return plain
        changed = self.delta.attend(host, base, query, key, value, mask, **kwargs)
        return blend(plain[0], changed[0], self.delta.strength), *changed[1:]

    def _share(self, base: Any, change: Callable[[], Any]) -> Any:
        strength = self.delta.strength
        return blend(base, change(), strength) if strength else base


def scale_of(adapter: "Adapter") -> float:
    """Return how much of an adapter's change is applied."""
    return next((delta.strength for _, _, delta in adapter.deltas), 1.0)


def set_scale(adapter: "Adapter", scale: float) -> None:
    """Apply `scale` times an adapter's change, in every module that it changes.

    Raises:
        AdapterError: it is no finite number, or nothing lies between this adapter and its base.
    """
    if not math.isfinite(scale):
        raise AdapterError(f"`scale` must be a finite number, but is {scale} instead.")
    _refuse_trained_in_place(adapter)
    for name, _, delta in adapter.deltas:
        if not delta.scalable:
            raise AdapterError(
                f"`scale` must stay 1 for adapter `{adapter.name}`: {type(delta).__name__} at "
                f"`{name or 'the model'}` lets virtual tokens in, all of them or none; call its "
                "`disabled()` to be without."
            )
    for _, host, delta in adapter.deltas:
        delta.strength = float(scale)
        slot_of(host).refresh()


@torch.no_grad()
def fold(delta: Delta, host: nn.Module) -> None:
    """Fold as much of a delta's change into its host's weights as is applied.

    Raises:
        NotMergeable: no weight of the host can hold it.
    """
    if delta.strength == 1:
        return delta.merge(host)
    if delta.strength and not delta.merges_scaled:
        raise NotMergeable(
            f"{type(delta).__name__} changes inputs and outputs, so that no weight gives a part of "
            "it: set the adapter's `scale` to 1."
        )
    before = {name: p.data for name, p in host._parameters.items() if p is not None}
    delta.merge(host)
    for name, data in before.items():
        parameter = host._parameters[name]
        if parameter is not None and parameter.data_ptr() != data.data_ptr():
            blended = blend(data, parameter.data, delta.strength) if delta.strength else data
            parameter.data = blended
    return None


def _refuse_trained_in_place(adapter: "Adapter") -> None:
    own = {name for method in adapter.methods for name in method.in_place(adapter.model)}
    if own:
        raise AdapterError(
            f"`scale` must stay 1 for adapter `{adapter.name}`, whose methods train weights in "
            f"place (`{min(own)}` and {len(own) - 1} more): use `combine(model, "
            f"{{{adapter.name!r}: scale}})`, which makes an adapter between it and the base."
        )
