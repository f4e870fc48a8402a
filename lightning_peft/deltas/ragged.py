"""Encoders' states of several lengths in one batch, where a decoder attends to virtual tokens too.

The shorter rows are filled up behind their end, and the decoder's mask says so.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.delta import Delta
from lightning_peft.deltas.virtual_tokens import ENCODER_MASKS, Attended
from lightning_peft.ops.rows import Key


class Reached(Delta):
    """On a decoder: ends the mask over the encoder's states where those of its rows end.

    Args:
        names: the names of the decoder's arguments, in order.
        missing: by how many states its rows are shorter than the longest.
    """

    def __init__(self, names: Sequence[str], missing: int) -> None:
        super().__init__()
        self.names, self.missing = tuple(names), missing

    def before(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Widen the mask to the length of the states, by what is not seen."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        states = given.get("encoder_hidden_states")
        if not isinstance(states, Tensor):
            return args, kwargs
        taken = [name for name in ENCODER_MASKS if name in self.names]
        key = next((k for k in ENCODER_MASKS if given.get(k) is not None), taken[0])
        mask, (rows, length) = given.get(key), states.shape[:2]
        if mask is None:
            mask = torch.ones(rows, length - self.missing, device=states.device, dtype=torch.long)
        if mask.dim() == 2:
            given |= {key: F.pad(mask, (0, length - mask.shape[1]))}
        return args[len(self.names) :], given


def reaching(chains: Mapping[Key, Sequence[Delta]]) -> dict[Key, list[Delta]]:
    """Return what acts on a decoder, with the masks of rows of different lengths mended."""
    attended = {
        key: [delta for delta in chain if isinstance(delta, Attended)]
        for key, chain in chains.items()
    }
    tokens = {key: sum(delta.tokens for delta in found) for key, found in attended.items()}
    found: dict[Key, list[Delta]] = {key: [*chain] for key, chain in chains.items()}
    if len(set(tokens.values())) > 1:
        names = next(delta.names for chain in attended.values() for delta in chain)
        for key, chain in found.items():
            chain.append(Reached(names, max(tokens.values()) - tokens[key]))
    return found
