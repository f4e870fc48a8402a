"""Whether settings that come from a file can be those of the tensors beside them."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_peft.errors import CheckpointError
from lightning_peft.method import Method

_ALWAYS = 4096
"""Up to this a setting is no burden, whatever the tensors."""


def check_sizes(methods: Sequence[Method], tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse ranks and sizes that are larger than all the tensors, before anything is made of them.

    Raises:
        CheckpointError: one is: the file was not written for these tensors.
    """
    held = sum(tensor.numel() for tensor in tensors.values())
    for method in methods:
        for name, value in _whole_numbers(method):
            if value > max(held, _ALWAYS):
                raise CheckpointError(
                    f"`{name}` in {where} is {value:,}, but its tensors hold {held:,} numbers in "
                    "all: the two do not belong together."
                )


def _whole_numbers(method: Any) -> Iterator[tuple[str, int]]:
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        values = value.values() if isinstance(value, Mapping) else [value]
        if field.name != "seed":  # which says where to begin, and not how much to make
            yield from ((field.name, v) for v in values if isinstance(v, int))
