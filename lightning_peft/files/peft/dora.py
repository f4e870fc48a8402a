"""DoRA: LoRA with `use_dora`.

peft keeps the magnitudes themselves, we keep how far they are from the norms of the weights. Their
sum is rounded, so our own file keeps ours beside peft's.
"""

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from lightning_peft.deltas.sites import Kernel
from lightning_peft.files.peft.lora import lora_config, plain_settings
from lightning_peft.files.peft.low_rank import Place, adapted_hosts, entries_of, places
from lightning_peft.files.peft.settings import Settings
from lightning_peft.files.peft.spelling import (
    BASE,
    Entry,
    Inexpressible,
    Part,
    Spelling,
    State,
    require_shape,
)
from lightning_peft.method import Method
from lightning_peft.methods.dora import Decomposed, DoRA


class DecomposedSpelling(Spelling):
    """Two trained factors and magnitudes."""

    peft_type = "LORA"
    kinds = ("dora",)

    def reads(self, settings: Settings) -> bool:
        """Whether the configuration decomposes the weight."""
        return settings.take("use_dora", False)

    def config(self, part: Part) -> dict[str, Any]:
        """Return the settings of the method as peft spells them."""
        return lora_config(part, _places(part)) | {"use_dora": True}

    def method(self, settings: Settings, keys: Sequence[str], model: nn.Module) -> Method:
        """Return DoRA with the settings."""
        if settings.take("bias", "none") != "none":
            raise settings.refusal("bias", "must be none together with `use_dora`")
        return DoRA(**plain_settings(settings, model, adapted_hosts(settings, model)))

    def entries(self, part: Part) -> list[Entry]:
        """Return A, B and the magnitudes of each product."""
        found = _places(part)
        factors = [entry for place in found for entry in entries_of(place)]
        return factors + [_magnitude(part, place) for place in found]


def _places(part: Part) -> list[Place]:
    found = places(part)
    if odd := [
        p.host for p in found if p.parameter is not None or "weight" not in _weights(part, p)
    ]:
        raise Inexpressible(f"peft cannot decompose the weights of `{odd[0]}`.")
    return found


def _weights(part: Part, place: Place) -> list[str]:
    return list(part.host(place.host)._parameters)


def _magnitude(part: Part, place: Place) -> Entry:
    key, ours = f"{BASE}{place.path}.lora_magnitude_vector", place.ours + "magnitude"
    product = cast(Decomposed, place.product)
    extent = len(product.site.weight) - 2 if isinstance(product.site, Kernel) else 0
    width = product.magnitude.numel()
    shape = (1, width, *[1] * extent) if extent else (width,)

    def norm() -> Tensor:
        weight = part.host(place.host)._parameters["weight"].detach()
        matrix = product.site.matrix(weight).to(product.magnitude.dtype)
        return matrix.norm(dim=-1)

    def write(state: State) -> Tensor:
        return (state[ours] + norm().to(state[ours].device)).reshape(shape)

    def read(tensor: Tensor) -> Tensor:
        flat = require_shape(key, tensor, shape).reshape(-1)
        return flat.to(product.magnitude.dtype) - norm().cpu()

    return Entry(key, ours, write, read, exact=False)


SPELLING = DecomposedSpelling()
