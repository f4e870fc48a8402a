"""Room for further tokens in tensors that have one entry per token, and its removal.

Each row of a batch may have its own place (behind its left padding), without a loop over the rows.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Place(NamedTuple):
    """Where in each row of a batch `size` further tokens stand."""

    start: Tensor | int
    """Index of the first of them, `(batch, 1)`, or one for all rows."""

    size: int
    """How many they are."""

    def open(self, x: Tensor, fill: Any, dim: int = 1, batch: int = 0) -> Tensor:
        """Return `x` with room for the tokens at `dim`.

        Args:
            x: `(..., length, ...)`.
            fill: what to put there: a number, or what broadcasts to the result.
            dim: the dimension of the tokens.
            batch: the dimension of the rows.
        """
        ahead = [0, 0] * (x.dim() - 1 - dim)
        before, behind = F.pad(x, [*ahead, 0, self.size]), F.pad(x, [*ahead, self.size, 0])
        at = self._index(before, dim, batch)
        inner = torch.where(at < self.size, fill, behind)
        return torch.where(at < 0, before, inner).to(x.dtype)

    def close(self, x: Tensor, dim: int = 1) -> Tensor:
        """Return `x`, `(batch, ..., length, ...)`, without the tokens at `dim`."""
        length = x.shape[dim] - self.size
        behind = x.narrow(dim, self.size, length)
        if isinstance(self.start, int) and self.start in (0, length):
            return x.narrow(dim, 0, length) if self.start else behind
        before = x.narrow(dim, 0, length)
        return torch.where(self._index(before, dim, 0) < 0, before, behind)

    def spread(self, values: Tensor, length: int) -> Tensor:
        """Return `(batch, length, ...)` with `values`, `(size, ...)`, where the tokens stand."""
        at = torch.arange(length, device=values.device).unsqueeze(0)
        return values[(at - self.start).clamp(0, self.size - 1)]

    def open_positions(self, x: Tensor) -> Tensor:
        """Return positions, `(..., batch, length)`, with the tokens' own; those behind move on."""
        rows = x if x.dim() > 1 else x[None]
        dim, batch = rows.dim() - 1, rows.dim() - 2
        if isinstance(self.start, Tensor) and x.dim() > 1:
            rows = rows.expand(*rows.shape[:batch], self.start.shape[0], rows.shape[dim])
        wider = self.open(rows, self.at_start(rows, dim, batch), dim, batch)
        wider = wider + self._index(wider, dim, batch).clamp(0, self.size)
        return wider if x.dim() > 1 else wider[0]

    def open_keys(self, mask: Tensor) -> Tensor:
        """Return a mask, as in `open_mask`, whose queries are not the text but see the tokens."""
        return self.open(mask, _seen(mask), mask.dim() - 1)

    def open_mask(
        self,
        mask: Tensor,
        past: Tensor | int | None = None,
        capacity: int = -1,
        causal: bool = True,
    ) -> Tensor:
        """Return a mask over the text and the tokens.

        Args:
            mask: `(batch, keys)`, or `(batch, ..., queries, keys)`, there true or 0.0 where a query
                sees a key.
            past: the number of keys before the first query, where the tokens are among those; None
                where they are among the queries.
            capacity: the number of keys of a static cache, all of which the mask covers.
            causal: whether a token may see only those before it; else the tokens see what the
                first token of text behind them sees.
        """
        per_query = mask.dim() > 2
        wider = self.open_keys(mask)
        if per_query and past is None:
            wider = self._open_queries(wider, causal)
        if per_query and capacity > 0:
            wider = wider[..., :capacity]
        if per_query and past is not None:  # it may have known of the tokens in the cache
            at, key = (torch.arange(n, device=mask.device) for n in wider.shape[-2:])
            reached = key <= at[:, None] + past
            wider = torch.where(reached, wider, _hidden(wider)).to(mask.dtype)
        return wider

    def at_start(self, x: Tensor, dim: int = 1, batch: int = 0) -> Tensor:
        """Return what `x` holds where the tokens are about to enter, of length 1 at `dim`."""
        last = x.shape[dim] - 1
        if isinstance(self.start, int):
            return x.narrow(dim, min(self.start, last), 1)
        shape = [1] * x.dim()
        shape[batch] = -1
        return x.take_along_dim(self.start.clamp(max=last).view(shape), dim)

    def _open_queries(self, wider: Tensor, causal: bool) -> Tensor:
        dim = wider.dim() - 2
        if causal:
            return self.open(wider, self._among_themselves(wider), dim)
        if wider.shape[dim] == 1:  # one row for all queries, and so for the tokens
            return wider
        return self.open(wider, self.at_start(wider, dim), dim)

    def _among_themselves(self, wider: Tensor) -> Tensor:
        """Return the rows of a mask for the tokens: each sees those up to itself."""
        keys, queries = wider.shape[-1], wider.shape[-2] + self.size
        at, key = (torch.arange(n, device=wider.device) for n in (queries, keys))
        start = self.start if isinstance(self.start, int) else self.start[..., None]
        causal = (key >= start) & (key <= at[:, None])
        shape = (-1, *[1] * (wider.dim() - 3), queries, keys)
        seen, hidden = (wider.new_full((), x) for x in (_seen(wider), _hidden(wider)))
        return torch.where(causal, seen, hidden).view(shape)

    def _index(self, x: Tensor, dim: int, batch: int) -> Tensor:
        """Return the index of each entry relative to `start`, shaped to broadcast to `x`."""
        at = torch.arange(x.shape[dim], device=x.device) - self.start
        shape = [1] * x.dim()
        shape[dim] = x.shape[dim]
        if at.dim() > 1:
            shape[batch] = at.shape[0]
        return at.view(shape)


def _seen(mask: Tensor) -> int:
    """Return what stands in a mask where a key is seen: 0 where it is added to scores, else 1."""
    return 0 if mask.dim() > 2 and mask.is_floating_point() else 1


def _hidden(mask: Tensor) -> float | int:
    return torch.finfo(mask.dtype).min if mask.is_floating_point() else 0


def behind_padding(mask: Tensor | None, skip: int) -> Tensor | int:
    """Return where tokens enter: behind the left padding, and behind `skip` tokens of text.

    Args:
        mask: as in `Place.open_mask`; None where there is no padding.
        skip: how many tokens of text stay ahead.
    """
    if mask is None:
        return skip
    additive = mask.dim() > 2 and mask.is_floating_point()
    visible = mask == 0 if additive else mask != 0
    if mask.dim() > 2:  # what the last query sees
        visible = visible.flatten(1, -2)[:, -1]
    return visible.int().argmax(-1, keepdim=True) + skip
