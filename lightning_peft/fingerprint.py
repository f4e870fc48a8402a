"""A fingerprint of the frozen base, so that an adapter never meets another base unnoticed.

It hashes each frozen tensor's name, shape and up to 64 values at equal distances. The values are
rounded to bfloat16 first: a base has the same fingerprint in float32 and cast to bfloat16. Reading
64 values a tensor takes milliseconds for a model of any size; a base that differs only between the
sampled places is not noticed.
"""

import hashlib
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_peft.carrying.registry import adapters_of
from lightning_peft.delta import SLOT, plain_name
from lightning_peft.errors import CheckpointError

if TYPE_CHECKING:
    from lightning_peft.adapter import Adapter

SAMPLES = 64
ALGORITHM = f"sha256 of names, shapes and {SAMPLES} values a tensor in bfloat16"


def fingerprint(model: nn.Module, exclude: Collection[str] = ()) -> dict[str, Any]:
    """Return the fingerprint of `model` without what adapters added and without `exclude`.

    Args:
        model: the base, injected or not.
        exclude: names of tensors that are trained in place and thus not part of the frozen base.

    Returns:
        `algorithm`, `sha256` and the number of `tensors` that went in.
    """
    digest, count = hashlib.sha256(), 0
    for name, tensor in sorted(_frozen(model, exclude)):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(_sample(tensor))
        count += 1
    return {"algorithm": ALGORITHM, "sha256": digest.hexdigest(), "tensors": count}


def fingerprint_for(
    model: nn.Module, exclude: Collection[str], own: "Adapter | None" = None
) -> dict[str, Any]:
    """Return the fingerprint of `model` as it is without its adapters but `own`.

    What those train in place is no part of the base, also while they act.

    Raises:
        AdapterError: the originals of what one of them trains in place were not kept.
    """
    with ExitStack() as stack:
        for other in adapters_of(model).values():
            if other is not own:
                stack.enter_context(other.disabled())
        return fingerprint(model, exclude)


def check_fingerprint(stored: dict[str, Any], present: dict[str, Any], what: str) -> None:
    """Refuse a base other than the one that was trained on.

    Raises:
        CheckpointError: the fingerprints differ.
    """
    if stored["sha256"] != present["sha256"]:
        raise CheckpointError(
            f"{what} was trained on another base: its {stored['tensors']} frozen tensors differ "
            f"from the {present['tensors']} of this one in name, shape or values; load the model "
            "that it was trained on, in the same revision."
        )


def _frozen(model: nn.Module, exclude: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    tensors = {plain_name(n): t for n, t in model.state_dict(keep_vars=True).items()}
    trained = {id(tensors[name]) for name in exclude if name in tensors}  # a tied one has two names
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and SLOT not in name.split(".") and id(tensor) not in trained:
            yield name, tensor


def _sample(tensor: Tensor) -> bytes:
    if tensor.is_meta or not tensor.numel():
        return b""
    flat = tensor.detach().reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64)
    values = flat[places.long().to(flat.device)].cpu()
    if values.is_floating_point():
        values = values.to(torch.bfloat16)
    return values.contiguous().view(torch.uint8).numpy().tobytes()
