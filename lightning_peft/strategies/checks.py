"""What a strategy cannot do, said before training starts."""

import hashlib
from collections.abc import Iterator

import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor

from lightning_peft.errors import AdapterError, ConfigError

_CUDA_ONLY = ("fsdp", "deepspeed")
_WRAPPERS = {
    "DistributedDataParallel": "DDP",
    "DataParallel": "DataParallel",
    "FullyShardedDataParallel": "FSDP",
    "FSDPModule": "FSDP2",
    "DeepSpeedEngine": "DeepSpeed",
}


def check_strategy(name: str, accelerator: str = "auto", clip: str | None = None) -> None:
    """Refuse a strategy that cannot run here.

    Args:
        name: Lightning's name of the strategy, for instance ``"fsdp"`` or ``"deepspeed_stage_2"``.
        accelerator: ``"cpu"``, ``"gpu"``, ``"auto"``, ….
        clip: how gradients are clipped: ``"norm"``, ``"value"``, or None for not at all.

    Raises:
        ConfigError: the strategy needs CUDA and there is none, or it cannot clip in this way.
    """
    family = name.split("_", maxsplit=1)[0]
    if family in _CUDA_ONLY and (accelerator == "cpu" or not torch.cuda.is_available()):
        raise ConfigError(
            f"`trainer={family}` needs a CUDA GPU, but there is none here (accelerator="
            f"{accelerator!r}): use `trainer=model_parallel` (FSDP2) or `trainer=ddp`, which run "
            "on CPU too."
        )
    if family == "fsdp" and clip == "norm":
        raise ConfigError(
            "`gradient_clip_algorithm` must be 'value' under FSDP, which holds only a part of each "
            "gradient, but is 'norm' instead: set it to 'value', or use `trainer=model_parallel`."
        )


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse a base that a strategy has already wrapped or sharded.

    A delta injected then is a plain tensor beside sharded ones: it is never synchronised, and
    the processes drift apart without an error.

    Raises:
        AdapterError: names the module and its wrapper.
    """
    for name, module in model.named_modules():
        for wrapper in _wrappers(module):
            raise AdapterError(
                f"`{name or type(model).__name__}` must be a bare module, but is already wrapped "
                f"by {wrapper}: inject first, then wrap; under "
                "`PEFTModelParallelStrategy` leave the sharding to the strategy."
            )


def is_sharded(module: nn.Module, recurse: bool = True) -> bool:
    """Return whether a parameter of `module` is split over processes."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters(recurse))


def assert_same_on_all_ranks(value: str, what: str) -> None:
    """Refuse to train when processes do not agree on `value`, for instance the resolved config.

    Every process must call this; alone, or before processes are connected, it does nothing.

    Raises:
        ConfigError: names the ranks that differ from rank 0.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    digests: list[str] = [""] * distributed.get_world_size()
    distributed.all_gather_object(digests, hashlib.sha256(value.encode()).hexdigest())
    differing = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
    if differing:
        raise ConfigError(
            f"{what} must be the same on all processes, but differs on rank "
            f"{', '.join(differing)} from rank 0: start every process with the same overrides, "
            "and run a sweep over several processes one job at a time."
        )


def _wrappers(module: nn.Module) -> Iterator[str]:
    # By name: deepspeed may not be installed, and importing the others is slow.
    for cls in type(module).__mro__:
        if cls.__name__ in _WRAPPERS and cls.__module__.startswith(("torch.", "deepspeed")):
            yield _WRAPPERS[cls.__name__]
    if is_sharded(module, recurse=False):
        yield "DTensor"
