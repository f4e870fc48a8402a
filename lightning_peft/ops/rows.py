"""Rows of a batch in groups: taken out of whatever has rows, and put back in their order.

What has a row for each name may also have several: beams of a search, windows of an image, tokens
end to end. They follow one another, as `repeat_interleave` leaves them.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_peft.errors import AdapterError

Key = tuple[str, ...]
"""The names of the adapters of a row, none for the base."""

NOTES = ("_virtual_place", "_virtual_ids")
"""What calls note on their own tensors, and a slice would lose."""

CACHES = ("past_key_values", "cache_params", "past_key_value", "layer_past", "mems")
"""Arguments and outputs that hold what earlier calls left."""

_KEPT = "_notes_by_key"
_SHARED = ("attn_mask", "mask", "src_mask", "tgt_mask", "memory_mask", "cache_position")
"""Arguments of few dimensions that hold for all rows, whatever their length."""


class Plan:
    """Which rows of a batch, or of a part of it, have which adapters.

    Args:
        keys: the adapters of each row.
        device: where the model is.
        rows: where the rows stand in the plan that this one is a part of.
        whole: the plan of the whole batch; None for itself.
    """

    def __init__(
        self,
        keys: Sequence[Key],
        device: torch.device,
        rows: Sequence[int] = (),
        whole: "Plan | None" = None,
    ) -> None:
        self.keys, self.device, self.rows = tuple(keys), device, tuple(rows)
        self.size, self.distinct = len(self.keys), tuple(dict.fromkeys(self.keys))
        self.sole = self.distinct[0] if len(self.distinct) == 1 else None
        """The adapters of all rows, if they are the same; None otherwise."""
        self.whole: Plan = self if whole is None else whole
        self.index = torch.tensor(self.rows, device=device)
        self._places: dict[tuple[Key, ...], Tensor] = {}
        self._parts: dict[Hashable, list[Plan]] = {}
        self._back: dict[Hashable, Tensor | None] = {}

    def places(self, keys: tuple[Key, ...]) -> Tensor:
        """Return for each row where its key stands among `keys`; behind them, if it does not."""
        if keys not in self._places:
            at = [keys.index(key) if key in keys else len(keys) for key in self.keys]
            self._places[keys] = torch.tensor(at, device=self.device)
        return self._places[keys]

    def parts(self, signs: Mapping[Key, Hashable] | None = None) -> "list[Plan]":
        """Return the rows whose keys have the same sign, or are the same, as plans of their own."""
        name = None if signs is None else tuple(signs.items())
        if name not in self._parts:
            rows: dict[Hashable, list[int]] = {}
            for row, key in enumerate(self.keys):
                rows.setdefault(key if signs is None else signs[key], []).append(row)
            self._parts[name] = [
                Plan([self.keys[i] for i in at], self.device, at, self.whole)
                for at in rows.values()
            ]
        return self._parts[name]

    def length(self, value: Any, where: str) -> int:
        """Return how many rows the first tensor in a value has.

        Raises:
            AdapterError: the number is no multiple of the rows that have names.
        """
        found = first_tensor(value)
        length = 1 if found is None else found.size(0)
        if length % self.size and length != 1:
            raise AdapterError(
                f"`{where or 'the model'}` gets {length} rows, but there are {self.size} "
                "names: give one for each row of the batch; what does not have the rows first "
                "cannot be mixed."
            )
        return length

    def taken(self, value: Any, part: "Plan", length: int) -> Any:
        """Return the rows of a part in a value, or in alike collections of values.

        Args:
            value: tensors without rows, and what is no tensor, stay as they are; what is the same
                stays the same.
            part: one of the `parts`.
            length: how many rows there are.
        """
        seen: dict[int, Tensor] = {}

        def take(value: Any, name: str = "") -> Any:
            if isinstance(value, Tensor):
                if length == 1 or not _has_rows(value, length, name):
                    return value
                if id(value) not in seen:
                    seen[id(value)] = self._rows(value, part)
                return seen[id(value)]
            if isinstance(value, dict):
                return _alike(value, {key: take(v, key) for key, v in value.items()})
            if isinstance(value, tuple | list):
                return _alike(value, [take(v, name) for v in value])
            return value

        return take(value)

    def joined(self, parts: "Sequence[Plan]", values: Sequence[Any], fill: bool = False) -> Any:
        """Return the values of all parts as one, with the rows in their order.

        Caches, and other objects without rows, are kept where they are the same.

        Args:
            parts: some `parts` of this plan.
            values: one for each of them, alike.
            fill: whether states `(rows, tokens, d)` may have different lengths.

        Raises:
            AdapterError: tensors have different shapes.
        """
        first = values[0]
        if all(value is first for value in values):
            return first
        if isinstance(first, Tensor):
            return self._joined(parts, _filled(values) if fill else values)
        if isinstance(first, dict):
            columns = {k: [v[k] for v in values] for k in first}
            for k, column in columns.items():
                if k in CACHES and any(v is not column[0] for v in column):
                    columns[k] = [None for _ in column]
            return _alike(first, {k: self.joined(parts, v, fill) for k, v in columns.items()})
        if isinstance(first, tuple | list):
            return _alike(first, [self.joined(parts, v, fill) for v in zip(*values, strict=True)])
        return first if all(type(v) is type(first) and v == first for v in values) else None

    def chosen(self, parts: "Sequence[Plan]", values: Sequence[Tensor], dim: int) -> Tensor:
        """Return of each value, which has all rows at `dim`, those of its part."""
        rows = [self._rows(x, part, dim) for x, part in zip(values, parts, strict=True)]
        return self._ordered(parts, torch.cat(rows, dim), dim)

    def _rows(self, x: Tensor, part: "Plan", dim: int = 0) -> Tensor:
        if x.is_nested:
            rows = x.unbind()
            return torch.nested.as_nested_tensor([rows[i] for i in part.rows])
        times, (start, stop) = x.shape[dim] // self.size, (part.rows[0], part.rows[-1] + 1)
        if stop - start == len(part.rows):
            found = x.narrow(dim, start * times, (stop - start) * times)
        elif times == 1:
            found = x.index_select(dim, part.index.to(x.device))
        else:
            blocks = x.unflatten(dim, (-1, times))
            found = blocks.index_select(dim, part.index.to(x.device)).flatten(dim, dim + 1)
        kept = getattr(x, _KEPT, {})
        for name, note in kept.get(part.sole, {}).items():
            setattr(found, name, note)
        return found

    def _joined(self, parts: "Sequence[Plan]", values: Sequence[Tensor]) -> Tensor:
        first = values[0]
        if first.is_nested:
            rows = [row for x in values for row in x.unbind()]
            back = self._order(parts)
            rows = rows if back is None else [rows[i] for i in back.tolist()]
            return torch.nested.as_nested_tensor(rows)
        if first.dim() == 0 or any(x.shape[1:] != first.shape[1:] for x in values):
            shapes = ", ".join(str(tuple(x.shape)) for x in values)
            raise AdapterError(
                f"The rows of a batch must get results of the same shape, but these are {shapes}."
            )
        if not _in_proportion(parts, values):
            if first.dim() == 1:  # positions of the tokens, and the like
                return first
            if any(len(x) != 1 for x in values):
                raise AdapterError(
                    f"The rows of a batch cannot be put together from {len(first)} and "
                    f"{len(values[-1])} for {len(parts[0].keys)} and {len(parts[-1].keys)} names."
                )
            values = [
                x.expand(len(p.keys), *x.shape[1:]) for p, x in zip(parts, values, strict=True)
            ]
        whole = self._ordered(parts, torch.cat([*values]), 0)
        if notes := {p.sole: _notes(x) for p, x in zip(parts, values, strict=True) if _notes(x)}:
            setattr(whole, _KEPT, notes)
        return whole

    def _ordered(self, parts: "Sequence[Plan]", x: Tensor, dim: int) -> Tensor:
        back = self._order(parts)
        if back is None:
            return x
        times, back = x.shape[dim] // self.size, back.to(x.device)
        if times == 1:
            return x.index_select(dim, back)
        return x.unflatten(dim, (-1, times)).index_select(dim, back).flatten(dim, dim + 1)

    def _order(self, parts: "Sequence[Plan]") -> Tensor | None:
        """Return where each row stands in what the parts give one after another."""
        rows = [row for part in parts for row in part.rows]
        name = tuple(rows)
        if name not in self._back:
            back = sorted(range(len(rows)), key=rows.__getitem__)
            ordered = back == [*range(len(rows))]
            self._back[name] = None if ordered else torch.tensor(back, device=self.device)
        return self._back[name]


def first_tensor(value: Any) -> Tensor | None:
    """Return the first tensor in a value, or in what a module was called with."""
    if isinstance(value, Tensor):
        return value
    inner = value.values() if isinstance(value, dict) else value
    if not isinstance(value, dict | tuple | list):
        return None
    return next((x for x in map(first_tensor, inner) if x is not None), None)


def _has_rows(x: Tensor, length: int, name: str) -> bool:
    if x.is_nested:
        return x.size(0) == length
    if x.dim() == 0 or (name in _SHARED and x.dim() < 3):
        return False
    # A mask may have the heads of each row, one after another.
    by_heads = x.dim() == 3 and name in (*_SHARED, "alibi") and not len(x) % length
    return x.shape[0] == length or by_heads


def _filled(values: Sequence[Tensor]) -> list[Tensor]:
    """Return states with zeros behind the shorter ones."""
    if any(x.is_nested or x.dim() != 3 for x in values):
        return [*values]
    longest = max(x.shape[1] for x in values)
    return [F.pad(x, (0, 0, 0, longest - x.shape[1])) for x in values]


def _in_proportion(parts: Sequence[Plan], values: Sequence[Tensor]) -> bool:
    """Whether each value has as many rows for a name as the others."""
    times = {len(x) / len(p.keys) for p, x in zip(parts, values, strict=True)}
    return len(times) == 1 and times.pop().is_integer()


def _notes(x: Tensor) -> dict[str, Any]:
    return {name: getattr(x, name) for name in NOTES if hasattr(x, name)}


def _alike(value: Any, items: Any) -> Any:
    """Return a collection of the kind of `value`."""
    if isinstance(value, dict):
        return items if type(value) is dict else type(value)(**items)
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
