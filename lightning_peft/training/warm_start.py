"""The start of methods that look at data first: each delta sees what its host receives, once.

The hooks of a LightningModule do it in the forward pass of the first batch that is trained on: that
costs no further pass, draws no batch and leaves the random generators alone. In a loop of one's
own, around the first forward pass::

    with warm_start(adapter, batch["attention_mask"]):
        loss = model(**batch).loss
"""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_peft.adapter import Adapter
from lightning_peft.carrying.group import AdapterGroup
from lightning_peft.carrying.registry import modules_of
from lightning_peft.delta import Delta
from lightning_peft.deltas.passing import first_input
from lightning_peft.errors import AdapterError
from lightning_peft.method import Method


def starts_from_data(adapter: Adapter | AdapterGroup) -> bool:
    """Whether a method of the adapter looks at data before the first step."""
    return any(method.starts_from_data for method in adapter.methods)


@contextmanager
def warm_start(adapter: Adapter, mask: Tensor | None = None) -> Iterator[None]:
    """Within this context the first call of each host starts its deltas.

    Args:
        adapter: what is to be trained.
        mask: `(batch, tokens)`, false where a token is padding and does not count.

    Raises:
        AdapterError: no host was called, or the adapter is sharded over processes.
    """
    watch = Watch(adapter, mask)
    try:
        yield
    finally:
        watch.close()
    watch.require_seen()


class Watch:
    """Hooks on the hosts of an adapter, each of which goes once it has seen an input."""

    def __init__(self, adapter: Adapter, mask: Tensor | None = None) -> None:
        self.mask, self.seen = mask, False
        self.handles: dict[str, RemovableHandle] = {}
        self.deltas: list[Delta] = []
        modules = modules_of(adapter.model)
        for method in adapter.methods:
            for host, delta in adapter.deltas_of(method).items() if method.starts_from_data else ():
                _refuse_sharded(host, delta)
                self.deltas.append(delta)
                see = functools.partial(self._see, host, method, delta)
                handle = modules[host].register_forward_pre_hook(see, with_kwargs=True)
                self.handles[host] = handle

    def close(self) -> None:
        """Take away the hooks that are left: nothing called their hosts."""
        for handle in self.handles.values():
            handle.remove()
        self.handles = {}

    def require_seen(self) -> None:
        """Refuse to train from a start that was not found.

        Raises:
            AdapterError: no host was called.
        """
        if not self.seen:
            raise AdapterError(
                "No module that the adapter changes was called by itself in the first forward "
                "pass, so nothing could start from its inputs: compile the model after that pass."
            )

    @torch.compiler.disable
    def _see(
        self, name: str, method: Method, delta: Delta, host: nn.Module, args: Any, kwargs: Any
    ) -> None:
        if name not in self.handles:
            return
        self.handles.pop(name).remove()
        self.seen = True
        x = first_input(args, kwargs).detach()
        if x.is_floating_point() and not x.is_nested:
            method.start_from(delta, self._rows(x))

    def _rows(self, x: Tensor) -> Tensor:
        """Return the inputs that count, `(rows, in)`."""
        if self.mask is not None and self.mask.shape == x.shape[:-1]:
            return x[self.mask.bool()]
        return x.flatten(0, -2)


def share(watch: Watch) -> None:
    """Give all processes the start of the first, whose batch was another.

    The gradients of a step that was taken from different starts are dropped.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    for parameter in (p for delta in watch.deltas for p in delta.parameters()):
        torch.distributed.broadcast(parameter.data, 0)
        if parameter.grad is not None:
            parameter.grad.zero_()


def mask_in(batch: Any) -> Tensor | None:
    """Return the mask of a batch, under the name that transformers gives it."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) else None


def _refuse_sharded(host: str, delta: Delta) -> None:
    for parameter in delta.parameters():
        if type(parameter.data) is not Tensor:
            raise AdapterError(
                f"`{host}` is sharded over processes, so its adapter cannot start from data: train "
                "with DDP, or take LoRA."
            )
