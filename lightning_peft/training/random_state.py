"""The random generators of all processes, so that a resumed run draws what it would have drawn."""

import random
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import distributed


def gather() -> list[dict[str, Any]]:
    """Return the states of every process, in plain containers and tensors; all must call this."""
    states: list[Any] = [None] * _world_size()
    if len(states) == 1:
        return [_own_state()]
    distributed.all_gather_object(states, _own_state())
    return states


def restore(states: Sequence[dict[str, Any]]) -> None:
    """Put the generators of this process where `gather` found them.

    Nothing is done when there is another number of processes: no state belongs to this one.
    """
    if len(states) != _world_size():
        return
    state = states[distributed.get_rank() if len(states) > 1 else 0]
    torch.set_rng_state(state["torch"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    _set_numpy_state(state["numpy"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([device.cpu() for device in state["cuda"]])


def _own_state() -> dict[str, Any]:
    import numpy as np

    version, internal, gauss = random.getstate()
    kind, keys, *rest = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(internal), gauss],
        "numpy": [str(kind), torch.from_numpy(keys.astype("int64")), *rest],
    }


def _set_numpy_state(state: list[Any]) -> None:
    import numpy as np

    kind, keys, *rest = state
    np.random.set_state((kind, keys.cpu().numpy().astype("uint32"), *rest))


def _world_size() -> int:
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if ready else 1
