"""What a checkpoint of a module with an adapter holds, and what is checked before it loads.

`state_dict` holds the trained tensors and the buffers that changed; `lightning_peft` what they
belong to: the methods, the base's fingerprint, the optimizers' parameter names, random states.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lightning_peft.carrying.state import check_state
from lightning_peft.delta import plain_name
from lightning_peft.errors import AdapterError, CheckpointError
from lightning_peft.fingerprint import check_fingerprint
from lightning_peft.training import random_state
from lightning_peft.training.optimizers import group_names
from lightning_peft.training.plain import make_plain

if TYPE_CHECKING:
    from lightning_peft.training.hooks import PEFTHooks

RECORD = "lightning_peft"
VERSION = 1
REMEDY = (
    "This checkpoint holds only what lightning-peft trained: load it with "
    "lightning_peft.PEFT.load_from_checkpoint(YourModule, path), or add the PEFT callback"
)
"""The name of an empty tensor among the weights, so that a strict load without us says this."""

_AVERAGED, _CURRENT = "averaging_state", "current_model_state"  # what Lightning's EMA adds


def trained(module: "PEFTHooks") -> dict[str, nn.Parameter]:
    """Return the trained parameters by their plain names in the LightningModule."""
    named, prefix = module.peft_adapter.named_parameters(), _prefix(module)
    return {f"{prefix}{name}": parameter for name, parameter in named.items()}


def own_tensors(module: "PEFTHooks") -> dict[str, Tensor]:
    """Return the trained parameters and the buffers that they need, by plain name."""
    prefix = _prefix(module)
    return {f"{prefix}{name}": t for name, t in module.peft_adapter.tensors().items()}


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of all buffers that a state dict holds, by plain name."""
    return {name: buffer.detach().clone() for name, buffer in _buffers(module).items()}


def is_fitting(module: Any) -> bool:
    """Whether a Trainer trains the module."""
    return module._trainer is not None and module.trainer.state.fn == "fit"


def reduce(checkpoint: dict[str, Any], module: "PEFTHooks") -> None:
    """Leave in `checkpoint` what was trained and what changed, and add our record."""
    own = own_tensors(module)
    keys = sorted({*own, *_changed_buffers(module)})
    # Averaging callbacks store whole copies of the module, beside its state or in their own.
    for part in (checkpoint, *checkpoint.get("callbacks", {}).values()):
        for key, state in part.items() if isinstance(part, dict) else ():
            if isinstance(state, Mapping) and own.keys() <= _plain_names(state):
                full = {plain_name(str(name)): tensor for name, tensor in state.items()}
                part[key] = {name: full[name] for name in keys if name in full}
    _require_all(checkpoint.get("state_dict"), own)
    omegaconf = make_plain(checkpoint)
    checkpoint[RECORD] = {
        "version": VERSION,
        **module.peft_injection.to_spec(),
        "fingerprint": module.peft_adapter.base_fingerprint,
        "random": random_state.gather(),
        "optimizers": _optimizer_names(module),
        "omegaconf": omegaconf,
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
    checkpoint["state_dict"].pop(REMEDY, None)
    for key in {"state_dict", _CURRENT} & checkpoint.keys():
        _check_tensors(checkpoint[key], module)
    if is_fitting(module):
        check_optimizers(record, module, {})
    if _AVERAGED in checkpoint:  # its callback loads strictly, into a copy of the module
        checkpoint["state_dict"] = completed(checkpoint["state_dict"], module)
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
    """Whether `state` is one of ours: it holds all that was trained, and nothing that is frozen."""
    if module.peft_injection.found_in(cast(nn.Module, module)) is None:
        return False
    names, own = _plain_names(state), own_tensors(module).keys()
    return own <= names <= own | (module.peft_buffers or {}).keys()


def completed(state: Mapping[str, Any], module: Any) -> dict[str, Any]:
    """Return a reduced state with the module's own tensors in place of those that it lacks."""
    # Not the module's own `state_dict`, which the user may have made smaller.
    full = nn.Module.state_dict(module)
    names = {plain_name(name): name for name in full}
    return full | {names.get(name, name): value for name, value in state.items()}


def snapshot(module: "PEFTHooks") -> dict[str, Tensor]:
    """Return copies of what is trained and of all buffers, by plain name."""
    own = {name: tensor.detach().clone() for name, tensor in own_tensors(module).items()}
    return persistent_buffers(cast(nn.Module, module)) | own


def check_optimizers(
    record: Mapping[str, Any], module: "PEFTHooks", before: Mapping[str, Tensor]
) -> None:
    """Refuse optimizers that hold other parameters than those whose state is restored.

    Args:
        record: of the checkpoint.
        module: which was already loaded from it.
        before: the tensors to put back into it.

    Raises:
        CheckpointError: a group holds other parameters.
    """
    stored, present = record["optimizers"], _optimizer_names(module)
    if stored and present and stored != present:
        with torch.no_grad():
            for name, tensor in (_buffers(cast(nn.Module, module)) | own_tensors(module)).items():
                tensor.copy_(before.get(name, tensor))
        raise CheckpointError(
            "The optimizers must hold the same parameters in the same groups as when the "
            f"checkpoint was saved ({_sizes(stored)} a group), but hold {_sizes(present)} instead: "
            "resume with the `configure_optimizers` that it was trained with."
        )


def use_safe_io(strategy: Any) -> None:
    """Let `strategy` save atomically and load safely, unless the user chose an IO plugin."""
    from lightning.pytorch.plugins.io import TorchCheckpointIO

    from lightning_peft.files.checkpoint_io import AtomicCheckpointIO

    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicCheckpointIO()


def _prefix(module: Any) -> str:
    """Return what stands before the adapter's names in the state dict of the LightningModule."""
    root = module.peft_adapter.model
    name = plain_name(next(name for name, child in module.named_modules() if child is root))
    return f"{name}." if name else ""


def _plain_names(state: Mapping[Any, Any]) -> set[str]:
    return {plain_name(str(name)) for name in state}


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    state = nn.Module.state_dict(module, keep_vars=True).items()
    found = {name: t for name, t in state if isinstance(t, Tensor) and name not in parameters}
    return {plain_name(name): buffer for name, buffer in found.items()}


def _changed_buffers(module: Any) -> list[str]:
    # The module's own running statistics and counters change too, and a resume needs them.
    now, before = _buffers(module), module.peft_buffers or {}
    pairs = [(name, old, now[name]) for name, old in before.items() if name in now]
    return [n for n, old, new in pairs if not torch.equal(old.to(new.device, new.dtype), new)]


def _require_all(state: dict[str, Any] | None, own: Mapping[str, Tensor]) -> None:
    """Add what a `state_dict` of the user's left out, and the remedy."""
    if state:  # processes other than the first may have nothing to save
        state |= {name: tensor.detach() for name, tensor in own.items() if name not in state}
        state[REMEDY] = torch.empty(0)


def _check_record(record: Mapping[str, Any], module: "PEFTHooks") -> None:
    if record["version"] != VERSION:
        raise CheckpointError(
            f"The checkpoint's version must be {VERSION}, but is {record['version']} instead: "
            "update lightning-peft."
        )
    expected = module.peft_injection.to_spec()
    for key, value in expected.items():
        if record.get(key) != value:
            raise CheckpointError(_difference(key, record.get(key), value))
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


def _check_tensors(state: Mapping[str, Any], module: "PEFTHooks") -> None:
    wanted = own_tensors(module)
    # Buffers of the module are there when they changed.
    wanted |= {name: t for name, t in (module.peft_buffers or {}).items() if name in state}
    try:
        check_state(wanted, state, "the checkpoint")
    except AdapterError as error:
        raise CheckpointError(f"The checkpoint does not fit: {error}") from error


def _optimizer_names(module: "PEFTHooks") -> list[list[list[str]]]:
    if getattr(module, "_trainer", None) is None:
        return []
    optimizers = cast(Any, module).trainer.optimizers
    return [group_names(optimizer, trained(module)) for optimizer in optimizers]


def _sizes(names: list[list[list[str]]]) -> str:
    return ", ".join(str(len(group)) for optimizer in names for group in optimizer)
