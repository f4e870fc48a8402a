"""Split a model with injected adapters over processes (FSDP2)."""

import itertools
from collections.abc import Iterator, Sequence

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_peft.errors import AdapterError
from lightning_peft.strategies.checks import is_sharded
from lightning_peft.structure import anatomy


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Split the parameters of `module` over the processes of `mesh`, layer by layer.

    Call it after injection, so that deltas are split like the weights beside them. Each layer of
    the model is gathered only while it computes; what lies outside layers stays gathered from
    its first use in a step to the last. A module that is split already stays as it is.

    Frozen weights in bf16 beside trained ones in fp32 are fine; what is trained within one layer
    must have one dtype.

    Raises:
        AdapterError: the trained parameters of a layer have different dtypes.
    """
    if is_sharded(module):
        return
    layers = {id(layer): layer for _, layer in anatomy.layers(module)}
    units = [*layers.values(), module]
    _require_one_dtype(units)
    for unit in units:
        fully_shard(unit, mesh=mesh)


def shard_children(module: nn.Module, mesh: DeviceMesh) -> None:
    """Split every child of a LightningModule, whose own ``forward`` is not what a step calls.

    Raises:
        AdapterError: a trained parameter belongs to no child: its gradient would differ between
            processes.
    """
    for child in _callable_children(module):
        shard(child, mesh)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            raise AdapterError(
                f"`{name}` must belong to a sub-module to be trained on several processes, but "
                "hangs directly on the LightningModule instead: move it into a module of its own, "
                "or use `trainer=ddp`."
            )


def like(value: Tensor, reference: Tensor) -> Tensor:
    """Return the full tensor `value`, split over processes as `reference` is (rank 0's counts)."""
    if isinstance(reference, DTensor) and not isinstance(value, DTensor):
        whole = value.to(reference.device)
        return distribute_tensor(whole, reference.device_mesh, reference.placements)
    return value


def whole(value: Tensor) -> Tensor:
    """Return a tensor gathered from all processes, on the CPU."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()


def _callable_children(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):  # containers without a forward
            yield from _callable_children(child)
        elif any(True for _ in child.parameters()):
            yield child


def _require_one_dtype(units: Sequence[nn.Module]) -> None:
    seen: set[int] = set()
    for unit in units:
        named = [(n, p) for n, p in unit.named_parameters() if id(p) not in seen]
        trained = {p.dtype: name for name, p in named if p.requires_grad}
        for (one, name), (other, another) in itertools.pairwise(trained.items()):
            raise AdapterError(
                f"What is trained in one layer must have one dtype to be sharded, but `{name}` is "
                f"{one} and `{another}` is {other}: load the base with `model.dtype=float32`, or "
                "train no base parameters in place."
            )
        seen.update(id(parameter) for _, parameter in named)
