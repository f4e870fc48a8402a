"""What the spellings of methods that change a weight as a whole have in common.

Each tensor of a delta is called `<host>.<tensor>` in peft, most often in our shape.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft.deltas.hosts import Parts
from lightning_peft.files.peft import names
from lightning_peft.files.peft.settings import Settings
from lightning_peft.files.peft.spelling import BASE, Entry, Inexpressible, Part, reshaped
from lightning_peft.structure.anatomy import is_conv1d

LINEAR = (nn.Linear,)
LINEAR_AND_CONV1D = (nn.Linear, Conv1D)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


def require_hosts(part: Part, kinds: tuple[type, ...]) -> None:
    """Refuse a host that peft's counterpart of the method does not change, or changes otherwise.

    Raises:
        Inexpressible: there is one.
    """
    for name in part.deltas:
        host = part.host(name)
        if not isinstance(host, kinds):
            raise Inexpressible(
                f"peft's {type(part.method).__name__} does not change a "
                f"{type(host).__name__} as ours does, and `{name}` is one."
            )


def own_tensors(part: Part) -> list[tuple[str, str, str, Tensor]]:
    """Return, for each tensor, its host, its name there, our key, and itself.

    Raises:
        Inexpressible: a host has several weights that change.
    """
    found = []
    for host, delta in part.deltas.items():
        inner, prefix = delta, ""
        if isinstance(delta, Parts):
            if [name for name, _ in delta.named_children()] != ["weight"]:
                raise Inexpressible(f"peft cannot change the weights of `{host}` by this method.")
            inner, prefix = delta.get_submodule("weight"), "weight."  # type: ignore[assignment]
        for name, tensor in inner.state_dict(keep_vars=True).items():
            found.append((host, name, part.key(host, prefix + name), tensor))
    return found


def entries_of(part: Part, end: str = "") -> list[Entry]:
    """Return the entries of tensors that have the same name and shape on both sides.

    Args:
        part: the method.
        end: what peft puts behind the names.
    """
    return [
        reshaped(f"{BASE}{host}.{name}{end}", ours, tensor.shape, tensor.shape)
        for host, name, ours, tensor in own_tensors(part)
    ]


def hosts_config(part: Part) -> dict[str, Any]:
    """Return the settings that name the hosts; others that could narrow them are left out."""
    hosts = names.shortest(names.module_names(part.model), part.deltas)
    return {"init_weights": True, "target_modules": hosts}


def turned(part: Part) -> bool:
    """Whether a host keeps its weight as `(in, out)`, which peft wants to be told."""
    return any(is_conv1d(part.host(host)) for host in part.deltas)


def targets_of(settings: Settings, model: nn.Module) -> tuple[str, ...]:
    """Return what a configuration targets, as patterns of ours; biases must not be trained.

    Raises:
        CheckpointError: it targets nothing, or trains biases.
    """
    settings.ignore("fan_in_fan_out")
    if settings.take("bias", "none") != "none":
        raise settings.refusal("bias", "must be none for this method")
    return names.as_targets(model, names.target_hosts(settings, model))


def uniform(part: Part, what: str, values: Sequence[int]) -> int:
    """Return the one value that all hosts have.

    Raises:
        Inexpressible: they differ, and peft has one setting for all.
    """
    if len({*values}) != 1:
        raise Inexpressible(
            f"peft has one {what} for all modules, but those of this adapter have "
            f"{', '.join(map(str, sorted({*values})))}."
        )
    return values[0]
