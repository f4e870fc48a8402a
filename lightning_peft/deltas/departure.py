"""A product that counts from where it started, as initialisations from the base's weights need."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_peft.deltas.low_rank import Product, Site, fresh_factors


class Departure(Product):
    """How far a product of two trained factors has come from what it was at its start.

        ΔW = s · (B A − B₀ A₀) = s · ((B − B₀) A + B₀ (A − A₀))

    The base stays what it is, and so does its output at the start, bitwise. The start is kept with
    the adapter: a decomposition may come out otherwise on another machine.

    Args:
        site: where the product acts.
        start: A₀ `(r, in)` and B₀ `(out, r)`; their rank may be lower than `r`.
        r: the rank.
        scale: factor s of the product.
        dropout: probability with which an input is zeroed in training.
    """

    start_a: Tensor
    start_b: Tensor

    def __init__(
        self, site: Site, start: tuple[Tensor, Tensor], r: int, scale: float, dropout: float = 0.0
    ) -> None:
        super().__init__(site, scale, dropout)
        self.lora_A, self.lora_B = fresh_factors(site, start[0], r)
        missing = r - start[0].shape[-2]
        a, b = F.pad(start[0], (0, 0, 0, missing)), F.pad(start[1], (0, missing))
        self.register_buffer("start_a", a.reshape(self.lora_A.shape).contiguous())
        self.register_buffer("start_b", b.reshape(self.lora_B.shape).contiguous())
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Go back to the start."""
        self.lora_A.copy_(self.start_a)
        self.lora_B.copy_(self.start_b)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return `[A; A − A₀]` and `[B − B₀, B₀]`, of rank 2r: exactly nothing at the start."""
        rows, columns = self.site.rank_dims
        a = torch.cat([self.lora_A, self.lora_A - self.start_a], rows)
        return a, torch.cat([self.lora_B - self.start_b, self.start_b], columns)
