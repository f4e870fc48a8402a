"""Compute a frozen part of the model once for each image, and many epochs over the rest."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_peft.delta import Delta
from lightning_peft.errors import AdapterError, ConfigError, DataError, TargetError, near_misses
from lightning_peft.marker import subclass, without
from lightning_peft.structure.anatomy import base_modules
from lightning_peft.structure.targets import matches

VIEW = "row_view"
"""The batch's name for what tells rows apart: equal texts, equal inputs."""


class FrozenFeatures(Callback):
    """Remember what a frozen part of the model computes, while a fit goes on.

    The part runs once for each view of a row (an image, and its mirror image, are two), and is
    answered from memory from then on. That is exact, but for the rounding of another batch, as long
    as its outputs depend on the view alone. So it is refused where the part is trained, carries an
    adapter or is random; and the first remembered batch is computed a second time and compared.
    Testing and predicting are left alone.

    Args:
        part: Name or end of the name of a module of the LightningModule, whose inputs and outputs
            have a row of the batch in each row.
        gigabytes: Most memory to use.

    Example::

        Trainer(callbacks=[FrozenFeatures("backbone")])

    Raises:
        TargetError: The name fits no module, or several.
        AdapterError: The part is not frozen.
    """

    def __init__(self, part: str, gigabytes: float = 4.0) -> None:
        if gigabytes <= 0:
            raise ConfigError(f"`gigabytes` must be more than 0, but is {gigabytes} instead.")
        self.part, self.gigabytes = part, gigabytes
        self._module: nn.Module | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name, module = _only(pl_module, self.part)
        _require_frozen(name, module)
        module.__class__ = subclass(cast(type, type(module)), _Remembering)
        module.__dict__["_peft_memory"] = _Memory(name, int(self.gigabytes * 1e9))
        self._module = module

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._tell(batch)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn == "fit":
            self._tell(batch)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._forget()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._forget()  # there is no teardown then

    def _forget(self) -> None:
        if self._module is not None:
            self._module.__class__ = without(cast(type, type(self._module)), _Remembering)
            del self._module.__dict__["_peft_memory"]
            self._module = None

    def _tell(self, batch: Any) -> None:
        if not isinstance(batch, Mapping) or VIEW not in batch:
            raise DataError(
                f"a batch must have `{VIEW}`, a text for each row that tells what the model sees, "
                f"for `FrozenFeatures` to remember it by: take the callback out, or add it."
            )
        if self._module is not None:
            self._module.__dict__["_peft_memory"].views = list(batch[VIEW])


class _Memory:
    """What a module computed for each view: the leaves of its output, without the batch."""

    def __init__(self, name: str, most: int) -> None:
        self.name, self.most = name, most
        self.views: list[str] = []
        self.rows: dict[tuple[str, torch.Size], list[Tensor]] = {}
        self.bytes, self.compared = 0, False
        self.spec: pytree.TreeSpec | None = None

    def keep(self, keys: Sequence[tuple[str, torch.Size]], output: Any) -> None:
        leaves, self.spec = pytree.tree_flatten(output)
        for leaf in leaves:
            if not isinstance(leaf, Tensor) or leaf.dim() == 0 or len(leaf) != len(keys):
                raise ConfigError(
                    f"`part` must return tensors with a row for each of the batch, but "
                    f"`{self.name}` does not: name another module."
                )
        for i, key in enumerate(keys):
            # Copies: a row of a larger tensor would keep all of that in memory.
            self.rows[key] = [leaf[i].detach().clone() for leaf in leaves]
            self.bytes += sum(leaf.nbytes for leaf in self.rows[key])
        if self.bytes > self.most:
            raise ConfigError(
                f"`gigabytes` must be enough for the features of `{self.name}`, but "
                f"{len(self.rows):,} rows fill {self.most / 1e9:g}: raise it, or take "
                f"`FrozenFeatures` out."
            )

    def recall(self, keys: Sequence[tuple[str, torch.Size]]) -> Any:
        found = [torch.stack(leaf) for leaf in zip(*(self.rows[k] for k in keys), strict=True)]
        return pytree.tree_unflatten(found, self.spec)  # type: ignore[arg-type]  # set by `keep`

    def compare(self, computed: Any, recalled: Any) -> None:
        """Check that a part computes what it did before.

        Raises:
            AdapterError: it does not.
        """
        self.compared = True
        pairs = zip(pytree.tree_leaves(computed), pytree.tree_leaves(recalled), strict=True)
        if not all(torch.allclose(a, b, rtol=1e-2, atol=1e-3 * b.abs().max()) for a, b in pairs):
            raise AdapterError(
                f"`{self.name}` must compute the same for the same `{VIEW}`, but does not: is it "
                f"random, or do rows change that keep their `{VIEW}`? Take `FrozenFeatures` out."
            )


class _Remembering:
    """Mixin of the remembered module."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        memory: _Memory = self.__dict__["_peft_memory"]
        x = next((one for one in pytree.tree_leaves((args, kwargs)) if _is_batch(one)), None)
        # Not the batch that was told: an example input, for instance.
        if x is None or len(x) != len(memory.views):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        keys = [(view, x.shape[1:]) for view in memory.views]
        new = [i for i, key in enumerate(keys) if key not in memory.rows]
        if new:
            some, named = pytree.tree_map(_taking(new, len(x)), (args, kwargs))
            memory.keep([keys[i] for i in new], super().forward(*some, **named))  # type: ignore[misc]
        recalled = memory.recall(keys)
        if not new and not memory.compared:
            with torch.no_grad():
                memory.compare(super().forward(*args, **kwargs), recalled)  # type: ignore[misc]
        return recalled


def _is_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _taking(rows: Sequence[int], count: int) -> Callable[[Any], Any]:
    """Return what takes `rows` out of each tensor that has all `count`, masks for example."""
    return lambda value: value[rows] if _is_batch(value) and len(value) == count else value


def _only(root: nn.Module, part: str) -> tuple[str, nn.Module]:
    modules = dict(base_modules(root))
    found = [name for name in modules if name and matches(part, name)]
    if len(found) != 1:
        ends = {name.rpartition(".")[2] for name in modules} - {""}
        hint = f": {', '.join(found[:3])}" if found else f".{near_misses(part, ends)}"
        raise TargetError(
            f"`part` must name one module, but {part!r} fits {len(found)} of "
            f"{type(root).__name__}{hint}"
        )
    return found[0], modules[found[0]]


def _require_frozen(name: str, part: nn.Module) -> None:
    """Refuse a part whose outputs could change while a fit goes on.

    Raises:
        AdapterError: it is trained, carries an adapter, or is random.
    """
    remedy = "name a part that stays as it is, or take `FrozenFeatures` out"
    for inner, module in part.named_modules():
        if isinstance(module, Delta):
            raise AdapterError(
                f"`{name}` must be frozen to be remembered, but carries an adapter at "
                f"`{name}.{inner}`: {remedy}."
            )
        if isinstance(module, nn.Dropout) and module.training and module.p > 0:
            raise AdapterError(
                f"`{name}` must not be random to be remembered, but `{name}.{inner}` drops in "
                f"train mode: {remedy}."
            )
    for inner, parameter in part.named_parameters():
        if parameter.requires_grad:
            raise AdapterError(
                f"`{name}` must be frozen to be remembered, but `{name}.{inner}` is trained: "
                f"{remedy}."
            )
