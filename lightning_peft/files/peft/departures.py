"""PiSSA, OLoRA and whatever else starts at a product taken out of the weight.

peft changes the base for them, and a file of its own fits only a base that it has changed alike. So
what is written is how far the product has come from its start, as a plain LoRA of twice the rank,
which fits the clean base and any reader; it cannot be trained on as what it was. What peft wrote is
read as our method of that name, which computes the same start from the same base.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import Tensor, nn

from lightning_peft.deltas.departure import Departure
from lightning_peft.files.peft.lora import lora_config, plain_settings
from lightning_peft.files.peft.low_rank import Place, adapted_hosts, as_peft, entries_of, places
from lightning_peft.files.peft.settings import Settings
from lightning_peft.files.peft.spelling import Entry, Part, Spelling, State
from lightning_peft.method import Method
from lightning_peft.methods.olora import OLoRA
from lightning_peft.methods.pissa import PiSSA


class DepartureSpelling(Spelling):
    """How far a product has come from its start."""

    peft_type = "LORA"
    lossless = False

    def writes(self, part: Part) -> bool:
        """Whether the method's deltas are departures."""
        products = [m for d in part.deltas.values() for m in d.modules() if hasattr(m, "factors")]
        return bool(products) and all(type(product) is Departure for product in products)

    def reads(self, settings: Settings) -> bool:
        """Whether the configuration starts at the weight's own directions."""
        start = settings.peek("init_lora_weights")
        return isinstance(start, str) and (start == "olora" or start.startswith("pissa"))

    def config(self, part: Part) -> dict[str, Any]:
        """Return the settings of a plain LoRA of twice the rank."""
        return lora_config(part, places(part))

    def method(self, settings: Settings, keys: Sequence[str], model: nn.Module) -> Method:
        """Return PiSSA or OLoRA with the settings."""
        if settings.take("use_dora", False):
            raise settings.refusal("use_dora", "must be off for this `init_lora_weights`")
        if settings.take("bias", "none") != "none":
            raise settings.refusal("bias", "must be none for this `init_lora_weights`")
        common = plain_settings(settings, model, adapted_hosts(settings, model))
        start = str(settings.peek("init_lora_weights"))
        if start == "olora":
            return OLoRA(**common)
        return PiSSA(**common, niter=_iterations(settings, start))

    def entries(self, part: Part) -> list[Entry]:
        """Return the factors of each departure to write, and A and B to read."""
        return [entry for place in places(part) for entry in _entries(place)]

    def derived(self, part: Part) -> dict[str, Tensor]:
        """Return where the products start."""
        found = ((p.ours, cast(Departure, p.product)) for p in places(part))
        return {f"{ours}{n}": t.cpu() for ours, p in found for n, t in p.named_buffers()}


def _entries(place: Place) -> list[Entry]:
    def factor(index: int) -> Callable[[State], Tensor]:
        # Of the live product: what it departs from is not in every state.
        return lambda _: as_peft(place.product.site, *place.product.factors())[index]

    read = enumerate(entries_of(place))
    return [Entry(e.theirs, e.ours, factor(i), e.read, False) for i, e in read]


def _iterations(settings: Settings, start: str) -> int:
    if start == "pissa":
        return 0
    count = start.removeprefix("pissa_niter_")
    if not count.isdigit():
        raise settings.refusal("init_lora_weights", "must be pissa or pissa_niter_<count>")
    return int(count)


SPELLING = DepartureSpelling()
