"""Held-out rows: drawn by seed, alike in their labels, and never seen in training."""

from collections.abc import Hashable, Iterable, Sequence

import torch

from lightning_peft.errors import ConfigError, DataError


def stratified_split(
    labels: Sequence[int], fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Split row numbers into those kept and those held out, each label in the same proportion.

    The draw depends on `seed` and the labels alone; the global random state is neither read nor
    moved.

    Returns:
        The kept and the held-out row numbers, both in ascending order.

    Raises:
        ConfigError: `fraction` is not between 0 and 1.
        DataError: A label has a single row, so one side would miss it.
    """
    _check_share(fraction)
    generator = torch.Generator().manual_seed(seed)
    held: set[int] = set()
    for label in sorted(set(labels)):
        rows = [i for i, other in enumerate(labels) if other == label]
        if len(rows) < 2:
            raise DataError(
                f"each label must have at least 2 rows to draw a validation split from, but "
                f"label number {label} has {len(rows)}: add rows, or give a validation file."
            )
        count = min(max(round(len(rows) * fraction), 1), len(rows) - 1)
        order = torch.randperm(len(rows), generator=generator).tolist()
        held.update(rows[i] for i in order[:count])
    return [i for i in range(len(labels)) if i not in held], sorted(held)


def grouped_split(groups: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split row numbers into those kept and those held out, each group as a whole.

    Groups are drawn by `seed` and held out while that brings the share nearer to `fraction`. Rows
    that are all of one group are drawn one by one.

    Returns:
        The kept and the held-out row numbers, both in ascending order.

    Raises:
        ConfigError: `fraction` is not between 0 and 1.
        DataError: There is a single row.
    """
    _check_share(fraction)
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    if len(groups) < 2:
        raise DataError(
            f"there must be at least 2 rows to hold one of them out, but there are {len(groups)}: "
            f"add rows, or give files by split."
        )
    if len(members) < 2:
        return stratified_split([0] * len(groups), fraction, seed)
    order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed)).tolist()
    found = [list(members.values())[i] for i in order]
    wanted, held = fraction * len(groups), list(found[0])
    for rows in found[1:-1]:
        if abs(len(held) + len(rows) - wanted) < abs(len(held) - wanted):
            held += rows
    kept = set(held)
    return [i for i in range(len(groups)) if i not in kept], sorted(held)


def connected(*columns: Sequence[Hashable | None]) -> list[int]:
    """Return a number for each row, the same for rows that share a value in any of the columns.

    None and empty texts are no values. Rows are connected through others too.
    """
    parents = list(range(len(columns[0])))

    def root(row: int) -> int:
        while parents[row] != row:
            parents[row] = parents[parents[row]]
            row = parents[row]
        return row

    for column in columns:
        first: dict[Hashable, int] = {}
        for row, value in enumerate(column):
            if value not in (None, ""):
                parents[root(row)] = root(first.setdefault(value, row))
    return [root(row) for row in range(len(parents))]


def sample(rows: int, limit: int | None, seed: int) -> list[int]:
    """Return at most `limit` of the row numbers below `rows`, drawn by seed, in ascending order."""
    if limit is None or rows <= limit:
        return list(range(rows))
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(rows, generator=generator)[:limit].tolist())


def few(labels: Sequence[int], shots: int, seed: int) -> list[int]:
    """Return at most `shots` row numbers of each label, drawn by seed, in ascending order."""
    generator = torch.Generator().manual_seed(seed)
    left = dict.fromkeys(labels, shots)
    chosen = []
    for row in torch.randperm(len(labels), generator=generator).tolist():
        if left[labels[row]]:
            left[labels[row]] -= 1
            chosen.append(row)
    return sorted(chosen)


def unseen(keys: Sequence[Hashable], held_out: Iterable[Hashable]) -> list[int]:
    """Return the numbers of the rows whose key is not among `held_out`."""
    forbidden = set(held_out)
    return [i for i, key in enumerate(keys) if key not in forbidden]


def normalised(text: str) -> str:
    """Return the text as duplicates are compared: case and runs of white space do not count."""
    return " ".join(text.split()).casefold()


def _check_share(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise ConfigError(
            f"`validation` must be a share between 0 and 1, but is {fraction} instead."
        )
