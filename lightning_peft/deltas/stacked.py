"""The low-rank products of several adapters beside one linear layer, as one stack."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_peft.delta import Delta
from lightning_peft.deltas.low_rank import Product, Site
from lightning_peft.deltas.passing import first_input
from lightning_peft.ops.rows import Key, Plan
from lightning_peft.ops.stacked import add_stacked


class Stack:
    """The low-rank products of several adapters beside one host.

    Args:
        products: of each key that has one.
    """

    def __init__(self, products: Mapping[Key, Product]) -> None:
        self.keys, self.products = tuple(products), tuple(products.values())
        scales = [product.scale for product in self.products]
        self.scales = torch.tensor([*scales, 1.0]).view(-1, 1, 1)
        self._kept: tuple[tuple[int, ...], tuple[Tensor, Tensor]] | None = None

    def add(
        self, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        """Return the output of the host with each row's product added."""
        x, first = first_input(args, kwargs), self.products[0]
        if first.dropout and first.training:
            x = F.dropout(x, first.dropout)
        a, b = self._factors()
        places = plan.places(self.keys).to(x.device)
        return add_stacked(output, x, a[places], b[places])

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return A `(products + 1, r, in)` and s B `(products + 1, out, r)`, the last ones zero."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._made()
        # Without a graph they are made once, as long as nothing is written into the parameters.
        state = tuple(p._version for d in self.products for p in d.parameters())
        if self._kept is None or self._kept[0] != state:
            self._kept = state, self._made()
        return self._kept[1]

    def _made(self) -> tuple[Tensor, Tensor]:
        factors = [product.factors() for product in self.products]
        r = max(len(a) for a, _ in factors)
        a = [F.pad(a, (0, 0, 0, r - len(a))) if len(a) < r else a for a, _ in factors]
        b = [F.pad(b, (0, r - b.shape[1])) if b.shape[1] < r else b for _, b in factors]
        ups = torch.stack([*b, torch.zeros_like(b[0])]) * self.scales.to(b[0])
        return torch.stack([*a, torch.zeros_like(a[0])]), ups


def stack_of(changes: Mapping[Key, Sequence[Delta]]) -> Stack | None:
    """Return the products of all keys as one stack, where there is nothing but such products."""
    chains = {key: chain for key, chain in changes.items() if chain}
    if not chains or any(len(c) != 1 or not _is_product(c[0]) for c in chains.values()):
        return None
    products = {key: cast(Product, chain[0]) for key, chain in chains.items()}
    alike = len({product.dropout for product in products.values()}) == 1
    return Stack(products) if alike else None


def _is_product(delta: Delta) -> bool:
    """Whether a delta adds a low-rank product beside a linear layer, and does nothing else."""
    product = isinstance(delta, Product) and type(delta).forward is Product.forward
    return product and type(cast(Product, delta).site) is Site
