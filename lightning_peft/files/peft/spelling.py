"""What one file of this package says about one kind of folder: `Spelling`, `Part`, `Entry`."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.adapter import Adapter
from lightning_peft.carrying.registry import modules_of
from lightning_peft.delta import SLOT, Delta
from lightning_peft.errors import AdapterError
from lightning_peft.files.peft.settings import Settings
from lightning_peft.method import Method

BASE = "base_model.model."
"""What peft puts before the name of a module."""

State = Mapping[str, Tensor]


class Inexpressible(AdapterError):
    """peft's format cannot hold the adapter; the message is the reason, one sentence."""


class Different(Inexpressible):
    """peft computes something else, as running the model has shown."""


@dataclass(frozen=True)
class Entry:
    """One tensor of peft's file, and how it is written and read."""

    theirs: str
    """Its key in peft's file."""

    ours: str | None
    """The key of our tensor that it becomes; None where it only has to be what it must be."""

    write: Callable[[State], Tensor]
    """Returns peft's tensor, given ours by key."""

    read: Callable[[Tensor], Tensor]
    """Returns our tensor, given peft's; raises AdapterError where it cannot be taken."""

    exact: bool = True
    """Whether reading what was written gives our tensor bit by bit."""

    optional: bool = False
    """Whether peft's file may lack it."""

    written: bool = True
    """Whether we write it."""


@dataclass(frozen=True)
class Part:
    """One method of an adapter, which is what one folder of peft's holds."""

    adapter: Adapter
    method: Method

    alone: bool = False
    """Whether it is written without what else the adapter has."""

    @property
    def model(self) -> nn.Module:
        """The model that carries the adapter."""
        return self.adapter.model

    @property
    def deltas(self) -> dict[str, Delta]:
        """The method's deltas by the name of their host."""
        return self.adapter.deltas_of(self.method)

    def companion(self, kind: str) -> "Part | None":
        """Return the part of another method that one folder holds with this one, if it is there."""
        found = [m for m in self.adapter.methods if m.kind == kind and not self.alone]
        return Part(self.adapter, found[0]) if found else None

    def key(self, host: str, name: str) -> str:
        """Return our key of the tensor `name` of the delta at `host`."""
        return f"{host}.{SLOT}.{self.adapter.name}_{self.method.kind}.{name}".lstrip(".")

    def host(self, name: str) -> Any:
        """Return the host module of that name."""
        return self._modules[name]

    @functools.cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return modules_of(self.model)


class Spelling(ABC):
    """One kind of folder in peft's format."""

    peft_type: ClassVar[str]
    """The `peft_type` of its configurations."""

    kinds: ClassVar[tuple[str, ...]] = ()
    """The kinds of methods that it writes."""

    lossless: ClassVar[bool] = True
    """Whether what it writes is all that is needed to train on: then `Adapter.save` uses it."""

    saves_modules: ClassVar[bool] = True
    """Whether its configurations have `modules_to_save`."""

    companions: ClassVar[tuple[str, ...]] = ()
    """The kinds of further methods that one configuration holds beside it."""

    base: ClassVar[str] = BASE
    """What precedes the names of modules trained in place."""

    def writes(self, part: Part) -> bool:
        """Whether this is the spelling of a method."""
        return part.method.kind in self.kinds

    def reads(self, settings: Settings) -> bool:
        """Whether it reads a configuration of its `peft_type`."""
        return True

    @abstractmethod
    def config(self, part: Part) -> dict[str, Any]:
        """Return the settings of the method as peft spells them.

        Raises:
            Inexpressible: peft cannot compute what the method does with these settings.
        """

    def check(self, part: Part) -> None:  # noqa: B027
        """Refuse what peft would compute otherwise, where only running the model tells.

        Raises:
            Different: peft would compute something else.
            Inexpressible: the model cannot be run as peft does.
        """

    @abstractmethod
    def method(
        self, settings: Settings, keys: Sequence[str], model: nn.Module
    ) -> Method | Sequence[Method]:
        """Return the method, or methods, that a configuration describes.

        Args:
            settings: to be taken one by one; what remains is refused.
            keys: of the tensors in the file.
            model: the bare base.

        Raises:
            CheckpointError: a setting cannot be honoured.
        """

    @abstractmethod
    def entries(self, part: Part) -> list[Entry]:
        """Return the entries of the method's tensors.

        Raises:
            Inexpressible: peft cannot hold them.
        """

    def derived(self, part: Part) -> dict[str, Tensor]:
        """Return those of our tensors that the base gives, by key, which peft's file lacks."""
        return {}


def same(theirs: str, ours: str) -> Entry:
    """Return the entry of a tensor that is the same on both sides."""
    return Entry(theirs, ours, lambda state: state[ours], lambda tensor: tensor)


def reshaped(
    theirs: str, ours: str, shape: Sequence[int], own: Sequence[int], exact: bool = True
) -> Entry:
    """Return the entry of a tensor that peft keeps in another shape."""

    def read(tensor: Tensor) -> Tensor:
        return require_shape(theirs, tensor, shape).reshape(tuple(own))

    return Entry(theirs, ours, lambda state: state[ours].reshape(tuple(shape)), read, exact)


def constant(theirs: str, value: Callable[[], Tensor], why: str, optional: bool = False) -> Entry:
    """Return the entry of a tensor that must have one value, for the reason `why`."""

    def read(tensor: Tensor) -> Tensor:
        own = value().cpu()
        if tensor.shape != own.shape or not torch.equal(tensor.to(own.dtype), own):
            raise AdapterError(f"`{theirs}` has other values than {why}.")
        return tensor

    written = not optional
    return Entry(theirs, None, lambda state: value(), read, optional=optional, written=written)


class Copies:
    """Tensors of peft's file that must be equal, since they are one with us (tied weights).

    Args:
        entry: of the one that is read.
    """

    def __init__(self, entry: Entry) -> None:
        self._entry, self._first = entry, (entry.theirs, torch.empty(0))
        self.entry = replace(entry, read=self._read)

    def further(self, theirs: str, optional: bool = False) -> Entry:
        """Return the entry of a copy."""

        def read(tensor: Tensor) -> Tensor:
            return self._agreeing(theirs, tensor)

        return Entry(theirs, None, self._entry.write, read, optional=optional)

    def _read(self, tensor: Tensor) -> Tensor:
        return self._entry.read(self._agreeing(self._entry.theirs, tensor))

    def _agreeing(self, theirs: str, tensor: Tensor) -> Tensor:
        if not self._first[1].numel():
            self._first = theirs, tensor
        key, first = self._first
        if first.shape != tensor.shape or not torch.equal(first, tensor):
            raise AdapterError(f"`{theirs}` differs from `{key}`, to which this model ties it.")
        return tensor


def require_shape(theirs: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return peft's tensor if it has a shape.

    Raises:
        AdapterError: it has another.
    """
    if tensor.shape != tuple(shape):
        raise AdapterError(
            f"`{theirs}` must have shape {tuple(shape)}, but has {tuple(tensor.shape)} instead."
        )
    return tensor
