"""Several adapters that are trained side by side, to optimizers and checkpoints as one."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapter import Adapter
from lightning_peft.delta import SLOT, plain_name
from lightning_peft.errors import AdapterError, ConfigError
from lightning_peft.method import Method
from lightning_peft.training.optimizers import parameter_groups


class AdapterGroup:
    """The adapters of a model that are trained in one run, each on rows of its own.

    None of them is active: the rows of a batch find theirs through `mixed`. What each trains in
    place stands aside, so that the model's own tensors are the base's at all times.

    Attributes:
        model: the module that carries them, or the modules that do.
        adapters: by name, in the order of their injection.
    """

    def __init__(self, model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
        self.model, self.adapters = model, dict(adapters)

    def __repr__(self) -> str:
        return f"AdapterGroup({', '.join(self.adapters)}; {self.num_parameters:,} parameters)"

    @property
    def name(self) -> str:
        """What a person calls them."""
        return ", ".join(self.adapters)

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods, in order, which are the same for all."""
        return next(iter(self.adapters.values())).methods

    @functools.cached_property
    def base_fingerprint(self) -> dict[str, Any]:
        """The fingerprint of the frozen base."""
        return next(iter(self.adapters.values())).base_fingerprint

    @property
    def num_parameters(self) -> int:
        """How many scalars are trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def in_place(self) -> list[str]:
        """The names of what stands in for the model's own tensors, sorted."""
        own = {f"{name}_own" for name in self.adapters}
        return [name for name in self.named_parameters() if own & set(name.split("."))]

    @property
    def beside_methods(self) -> set[str]:
        """The names of what is trained in place, which is no method's own in a group."""
        return set(self.in_place)

    @property
    def lr_scales(self) -> dict[str, float]:
        """By name, how many times faster a parameter learns, where it is not once."""
        return {n: s for adapter in self.adapters.values() for n, s in adapter.lr_scales.items()}

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return what is trained, sorted by the names of `model.named_parameters()`."""
        trained = {id(p) for adapter in self.adapters.values() for p in adapter.parameters()}
        named = {plain_name(n): p for n, p in self.model.named_parameters() if id(p) in trained}
        return dict(sorted(named.items()))

    def parameters(self) -> list[nn.Parameter]:
        """Return what is trained, sorted by name."""
        return list(self.named_parameters().values())

    def parameter_groups(
        self, lr: float, weight_decay: float = 0.0, head_lr: float | None = None
    ) -> list[dict[str, Any]]:
        """Return what is trained as an optimizer's groups; see `Adapter.parameter_groups`."""
        return parameter_groups(self, lr, weight_decay, head_lr)

    def tensors(self) -> dict[str, Tensor]:
        """Return what is trained and the buffers that it needs, by the model's own keys."""
        own = {id(t) for adapter in self.adapters.values() for t in adapter.tensors().values()}
        state = self.model.state_dict(keep_vars=True)
        return {plain_name(n): t for n, t in state.items() if SLOT in n.split(".") and id(t) in own}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the trained tensors and the buffers that they need, by the model's own keys."""
        return {name: tensor.detach() for name, tensor in self.tensors().items()}

    def settle(self) -> "AdapterGroup":
        """Let all stand aside and be trained."""
        for adapter in self.adapters.values():
            adapter.deactivate()
            adapter.requires_grad_()
        return self

    def hold_back(self, epoch: int) -> None:
        """Drop the gradients of what a method does not train yet in `epoch` (counted from 0)."""
        for adapter in self.adapters.values():
            adapter.hold_back(epoch)

    def save(self, folder: str | Path) -> Path:
        """Write each adapter to a folder of its name below `folder`, and return that.

        Raises:
            CheckpointError: a folder cannot be written, or a tensor holds NaN or infinite values.
        """
        for name, adapter in self.adapters.items():
            adapter.save(Path(folder) / name)
        return Path(folder)


class Views(nn.ModuleDict):
    """Models with heads of their own on one base, whose tensors are there once.

    Tensors of the same name and values become the first model's: the modules that hold them stay
    several, so that each model carries its own adapter.

    Args:
        models: by the name of the adapter of each.
    """

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        super().__init__(models)
        shared: dict[str, nn.Parameter] = {}
        for model in models.values():
            for name, parameter in list(model.named_parameters()):
                first = shared.setdefault(name, parameter)
                if first is not parameter and _equal(first, parameter):
                    owner, _, key = name.rpartition(".")
                    model.get_submodule(owner).register_parameter(key, first)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def check_groupable(methods: Sequence[Method]) -> None:
    """Refuse methods that cannot train several adapters side by side.

    Raises:
        ConfigError: one starts from data, acts around optimizer steps, or needs trained adapters.
    """
    for method in methods:
        if method.starts_from_data or method.steers or method.builds_on_adapters:
            raise ConfigError(
                f"`{method.kind}` cannot train several adapters side by side, since it looks at "
                "data, at optimizer steps or at other adapters: train them one by one."
            )


def single(adapter: "Adapter | AdapterGroup", what: str) -> Adapter:
    """Return one adapter.

    Raises:
        AdapterError: it is a group of several.
    """
    if isinstance(adapter, AdapterGroup):
        raise AdapterError(
            f"`{what}` takes one adapter, but the run trained several: {adapter.name}. Give the "
            f"folder of one of them."
        )
    return adapter
