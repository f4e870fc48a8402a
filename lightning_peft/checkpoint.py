"""What a Lightning checkpoint of a module with an adapter holds, and what is checked before it loads.

`state_dict` holds the trained tensors and the buffers that changed; `lightning_peft` holds what they
belong to: the methods, the base's fingerprint, the optimizers' parameter names and random states.
"""

import random
from collections.abc import Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, distributed, nn

from lightning_peft.adapter import check_state
from lightning_peft.delta import plain_name
from lightning_peft.errors import AdapterError, CheckpointError
from lightning_peft.fingerprint import check_fingerprint
from lightning_peft.optimizers import group_names

if TYPE_CHECKING:
    from lightning_peft.hooks import PEFTHooks

RECORD = "lightning_peft"
VERSION = 1
REMEDY = (
    "This checkpoint holds only what lightning-peft trained: load it with "
    "lightning_peft.PEFT.load_from_checkpoint(YourModule, path), or add the PEFT callback"
)
"""The name of an empty tensor among the weights, so that a strict load without us says this."""


def trained(module: "PEFTHooks") -> dict[str, nn.Parameter]:
    """Return the trained parameters by their plain names in the LightningModule."""
    named = module.peft_adapter.named_parameters()
    return {f"{_prefix(module)}{name}": parameter for name, parameter in named.items()}


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of all buffers that a state dict holds, by plain name."""
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    state = module.state_dict(keep_vars=True)
    return {
        plain_name(name): tensor.detach().clone()
        for name, tensor in state.items()
        if isinstance(tensor, Tensor) and name not in parameters
    }


def reduce(checkpoint: dict[str, Any], module: "PEFTHooks") -> None:
    """Leave in `checkpoint` what was trained and what changed, and add our record."""
    full = {plain_name(name): tensor for name, tensor in checkpoint.get("state_dict", {}).items()}
    keys = [*_own(module), *_changed_buffers(full, module)]
    if full:  # ranks other than the first have nothing to save
        kept = {name: full[name] for name in sorted(set(keys))}
        checkpoint["state_dict"] = {**kept, REMEDY: torch.empty(0)}
    for key in [key for key in checkpoint if key.endswith("hyper_parameters")]:
        checkpoint[key] = plain(checkpoint[key])
    checkpoint[RECORD] = {
        "version": VERSION,
        **module.peft_injection.to_spec(),
        "fingerprint": module.peft_adapter.base_fingerprint,
        "random": _gather(_random_state()),
        "optimizers": _optimizer_names(module),
    }


def open_checkpoint(checkpoint: dict[str, Any], module: "PEFTHooks") -> dict[str, Any] | None:
    """Check that `checkpoint` belongs to `module`, and return our record of it.

    Returns:
        None for a checkpoint of the bare base, which loads as it always did.

    Raises:
        CheckpointError: the base, the methods, or a tensor's name, shape or values do not fit.
    """
    record: dict[str, Any] | None = checkpoint.get(RECORD)
    if record is None:
        return None
    _check_record(record, module)
    state = checkpoint.get("state_dict", {})
    state.pop(REMEDY, None)
    if state:
        _check_tensors(state, module)
    if getattr(module, "_trainer", None) is not None and cast(Any, module).trainer.optimizers:
        check_optimizers(record, module)
    return record


def record_of(checkpoint: Mapping[str, Any], path: Any) -> Mapping[str, Any]:
    """Return our record in a checkpoint.

    Raises:
        CheckpointError: it has none: it was not trained with lightning-peft.
    """
    if RECORD not in checkpoint:
        raise CheckpointError(
            f"`{path}` must be a checkpoint of lightning-peft, but is a plain one instead: load it "
            "with the `load_from_checkpoint` of its own class."
        )
    record: Mapping[str, Any] = checkpoint[RECORD]
    return record


def is_reduced(state: Mapping[str, Any], module: "PEFTHooks") -> bool:
    """Whether `state` is one of ours: it holds all that was trained."""
    return not module.peft_pending and set(_own(module)) <= {plain_name(name) for name in state}


def check_optimizers(record: Mapping[str, Any], module: "PEFTHooks") -> None:
    """Refuse optimizers that hold other parameters than those whose state is restored.

    Raises:
        CheckpointError: a group holds other parameters.
    """
    stored, present = record["optimizers"], _optimizer_names(module)
    if stored and present and stored != present:
        raise CheckpointError(
            "The optimizers must hold the same parameters in the same groups as when the "
            f"checkpoint was saved ({_sizes(stored)} a group), but hold {_sizes(present)} instead: "
            "resume with the `configure_optimizers` that it was trained with."
        )


def restore_random_state(record: Mapping[str, Any]) -> None:
    """Put the random generators of this process where they were when the checkpoint was saved."""
    rank, states = _rank(), record["random"]
    if len(states) != _world_size():
        return  # another number of processes: no state belongs to this one
    state = states[rank]
    torch.set_rng_state(state["torch"])
    random.setstate((state["python"][0], tuple(state["python"][1]), state["python"][2]))
    _set_numpy_state(state["numpy"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def use_safe_io(strategy: Any) -> None:
    """Let `strategy` save atomically and load safely, unless the user chose an IO plugin."""
    from lightning.pytorch.plugins.io import TorchCheckpointIO

    from lightning_peft.files.checkpoint_io import AtomicCheckpointIO

    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicCheckpointIO()


def plain(value: Any) -> Any:
    """Return hyper-parameters in containers that a safe load accepts."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, PurePath):
        return str(value)
    if type(value).__module__ == "numpy" and hasattr(value, "item") and value.ndim == 0:
        return value.item()
    if type(value).__name__ == "ListConfig" or isinstance(value, (list, tuple)):
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else list(value)
    return value


def _own(module: "PEFTHooks") -> dict[str, Tensor]:
    prefix = _prefix(module)
    return {f"{prefix}{name}": t for name, t in module.peft_adapter.tensors().items()}


def _prefix(module: Any) -> str:
    """Return what stands before the adapter's names in the state dict of the LightningModule."""
    root = module.peft_adapter.model
    name = plain_name(next(name for name, child in module.named_modules() if child is root))
    return f"{name}." if name else ""


def _changed_buffers(full: Mapping[str, Tensor], module: "PEFTHooks") -> list[str]:
    # The module's own running statistics and counters change too, and a resume needs them.
    before = module.peft_buffers or {}
    return [n for n, t in before.items() if n in full and not torch.equal(t, full[n].to(t.device))]


def _check_record(record: Mapping[str, Any], module: "PEFTHooks") -> None:
    if record["version"] != VERSION:
        raise CheckpointError(f"Its version must be {VERSION}, but is {record['version']} instead.")
    expected = module.peft_injection.to_spec()
    for key, value in expected.items():
        if record[key] != value:
            raise CheckpointError(_difference(key, record[key], value))
    present = module.peft_adapter.base_fingerprint
    check_fingerprint(record["fingerprint"], present, "The checkpoint")


def _difference(key: str, stored: Any, present: Any) -> str:
    if key == "methods" and len(stored) == len(present):
        old, new = next((s, p) for s, p in zip(stored, present, strict=True) if s != p)
        key = next(k for k in {**old, **new} if old.get(k) != new.get(k))
        stored, present = old.get(key), new.get(key)
    return (
        f"The checkpoint was trained with `{key}` = {stored!r}, but here it is {present!r}: "
        "give the settings that it was trained with."
    )


def _check_tensors(state: dict[str, Any], module: "PEFTHooks") -> None:
    wanted = _own(module)
    extra = state.keys() & (module.peft_buffers or {}).keys() - wanted.keys()
    try:
        check_state(wanted, {n: t for n, t in state.items() if n not in extra}, "the checkpoint")
    except AdapterError as error:
        raise CheckpointError(f"The checkpoint does not fit: {error}") from error


def _optimizer_names(module: "PEFTHooks") -> list[list[list[str]]]:
    if getattr(module, "_trainer", None) is None:
        return []
    optimizers = cast(Any, module).trainer.optimizers
    return [group_names(optimizer, trained(module)) for optimizer in optimizers]


def _sizes(names: list[list[list[str]]]) -> str:
    return ", ".join(str(len(group)) for optimizer in names for group in optimizer)


def _random_state() -> dict[str, Any]:
    import numpy as np

    version, internal, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(internal), gauss],
        "numpy": [str(kind), torch.from_numpy(keys.astype("int64")), *rest],
    }


def _set_numpy_state(state: list[Any]) -> None:
    import numpy as np

    kind, keys, *rest = state
    np.random.set_state((kind, keys.numpy().astype("uint32"), *rest))


def _gather(state: dict[str, Any]) -> list[dict[str, Any]]:
    states: list[Any] = [None] * _world_size()
    if len(states) == 1:
        return [state]
    distributed.all_gather_object(states, state)
    return states


def _world_size() -> int:
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if ready else 1


def _rank() -> int:
    return distributed.get_rank() if _world_size() > 1 else 0
