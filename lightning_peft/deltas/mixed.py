"""Batches whose rows have different adapters: what stands in for the deltas of a host meanwhile.

A `Mixture` takes the rows of each adapter out of what its host receives and gives, lets that
adapter's deltas act on them, and puts the rows back. Low-rank products beside a linear layer act in
two batched products for all rows at once. What cannot differ by row, a weight that the host reads
or the number of virtual tokens, makes the host's forward pass run once for each part of the batch
(`Apart`), within which the rest of the model knows of these rows alone.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.delta import Delta
from lightning_peft.deltas.passing import acting_rows, among
from lightning_peft.deltas.stacked import Stack, stack_of
from lightning_peft.deltas.virtual_tokens import Enter
from lightning_peft.errors import AdapterError
from lightning_peft.merging.scaling import Part
from lightning_peft.ops.rows import CACHES, Key, Plan, first_tensor

_RUNNING = threading.local()
"""The part of a batch that a thread's forward pass is in."""

_NORM = nn.modules.batchnorm._NormBase


APART = "_peft_apart"
"""Under this name an `Apart` module keeps its `Parting`."""


class Batch:
    """Which rows go through a model at this time."""

    def __init__(self) -> None:
        self.plan = Plan([()], torch.device("cpu"))

    def current(self) -> Plan:
        """Return the plan of the batch, or of the part of it that this thread's pass is in."""
        part: Plan | None = getattr(_RUNNING, "part", None)
        return part if part is not None and part.whole is self.plan else self.plan


class Mixture(Delta):
    """Stands in for the deltas of one host, each for the rows of its adapter.

    Args:
        where: the host's name.
        batch: which rows have which adapters.
        changes: the deltas that act on the rows of each key, in order.
        signs: which keys may go through the host's forward pass together; None for all.
        here: whether it is the host's own forward pass that runs in parts, and not its parent's.
    """

    where: str
    batch: Batch
    changes: Mapping[Key, Sequence[Delta]]
    signs: Mapping[Key, Hashable] | None
    here: bool
    stack: Stack | None

    def __init__(
        self,
        where: str,
        batch: Batch,
        changes: Mapping[Key, Sequence[Delta]],
        signs: Mapping[Key, Hashable] | None = None,
        here: bool = True,
    ) -> None:
        super().__init__()
        acting = [delta for chain in changes.values() for delta in chain]
        # Not as children: the deltas stay children of their slot alone.
        self.__dict__.update(where=where, batch=batch, changes=changes, signs=signs, here=here)
        self.reads = any(overrides(delta, "before") for delta in acting)
        self.writes = any(overrides(delta, "forward") for delta in acting)
        self.attends = any(overrides(delta, "attend") for delta in acting)
        self.__dict__["stack"] = stack_of(changes)

    def before(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Return the inputs, each row changed by its adapter."""
        plan = self.batch.current()
        if not self.reads or self._apart(plan):
            return args, kwargs
        if plan.sole is not None:
            return self._before(plan.sole, host, args, kwargs)
        length, parts = plan.length((args, kwargs), self.where), plan.parts()
        given = [plan.taken((args, kwargs), part, length) for part in parts]
        changed = [self._before(p.sole, host, *g) for p, g in zip(parts, given, strict=True)]
        return cast(tuple[Any, dict[str, Any]], plan.joined(parts, changed))

    def forward(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Return the output, each row changed by its adapter."""
        plan = self.batch.current()
        if not self.writes or self._apart(plan):
            return output
        if plan.sole is not None:
            return self._after(plan.sole, host, args, kwargs, output)
        length = plan.length((args, kwargs), self.where)
        if self.stack is not None and length > 1 and _plain(output):
            return self.stack.add(plan, args, kwargs, output)
        outer, parts = plan.length(output, self.where), plan.parts()
        changed = [
            self._after(
                part.sole,
                host,
                *plan.taken((args, kwargs), part, length),
                plan.taken(output, part, outer),  # type: ignore[call-arg]
            )
            for part in parts
        ]
        return plan.joined(parts, changed)

    def reweigh(self, host: nn.Module, name: str, weight: Tensor) -> Tensor:
        """Return a weight as the rows that go through the host at this time have it."""
        plan = self.batch.current()
        if self._differ(plan):  # asked for by others: its dtype, its device
            return weight
        for delta in self.changes[plan.keys[0]]:
            weight = delta.reweigh(host, name, weight)
        return weight

    def attend(
        self,
        host: nn.Module,
        base: Callable[..., Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        **kwargs: Any,
    ) -> Any:
        """Return what attention gives, each row with its adapter's keys and values."""
        plan = self.batch.current()
        if not self.attends:
            return base(host, query, key, value, mask, **kwargs)
        if plan.sole is not None:
            return self._attend(plan.sole, base, host, query, key, value, mask, **kwargs)
        inputs, parts = (query, key, value, mask), plan.parts()
        if getattr(base, "whole", False) or len(query) == 1:
            return self._attend_whole(plan, base, host, inputs, kwargs)
        length = plan.length(query, self.where)
        results = [
            self._attend(
                part.sole,
                base,
                host,
                *plan.taken(inputs, part, length),
                **plan.taken(kwargs, part, length),
            )
            for part in parts
        ]
        return plan.joined(parts, _with_equal_keys(results))

    def chain_of(self, delta: Delta) -> Sequence[Delta]:
        """Return what acts on the same rows as `delta`."""
        rows = acting_rows()
        return () if rows is None else self.changes.get(rows, ())

    def _attend_whole(
        self,
        plan: Plan,
        base: Callable[..., Any],
        host: nn.Module,
        inputs: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Attend with each adapter's keys in all rows, where these cannot be taken apart."""
        if any(overrides(d, "before") for p in plan.parts() for d in self.changes[_key(p)]):
            raise AdapterError(
                f"`{self.where}` writes its attention out for the whole batch, where gates that "
                "are made from some rows cannot act: run the rows of each adapter apart."
            )
        parts = plan.parts()
        results = [self._attend(part.sole, base, host, *inputs, **kwargs) for part in parts]
        outputs = [result[0] for result in results]
        dim = 2 if len(outputs[0]) == 1 else 0  # (1, tokens, batch · heads, d_value)
        return plan.chosen(parts, outputs, dim), results[0][1]

    def _attend(
        self, key: Any, base: Callable[..., Any], host: Any, *inputs: Any, **kw: Any
    ) -> Any:
        for delta in reversed(self.changes[key]):
            if overrides(delta, "attend"):
                base = functools.partial(_through, delta, base)
        with among(key):
            return base(host, *inputs, **kw)

    def _before(
        self, key: Any, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        with among(key):
            for delta in self.changes[key]:
                args, kwargs = delta.before(host, args, kwargs)
        return args, kwargs

    def _after(
        self, key: Any, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        with among(key):
            for delta in self.changes[key]:
                output = delta(host, args, kwargs, output)
        return output

    def _apart(self, plan: Plan) -> bool:
        """Whether the host's forward pass is run in parts, and the deltas act within."""
        return self.here and self._differ(plan)

    def _differ(self, plan: Plan) -> bool:
        return self.signs is not None and len(plan.parts(self.signs)) > 1


class Apart:
    """Mixin of a host whose forward pass runs once for each part of a batch."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the host's own forward pass on the rows of each part."""
        return self.__dict__[APART].run(self, super().forward, args, kwargs)  # type: ignore[misc]


class Parting:
    """How the forward pass of one module is run in parts.

    Args:
        where: the module's name.
        batch: which rows have which adapters.
        signs: keys of equal sign run together.
        mixture: the module's own deltas, if it has any.
        trained: of a normalisation with statistics, the keys that train it.
    """

    def __init__(
        self,
        where: str,
        batch: Batch,
        signs: Mapping[Key, Hashable],
        mixture: Mixture | None,
        trained: Sequence[Key],
    ) -> None:
        self.where, self.batch, self.signs, self.mixture = where, batch, signs, mixture
        self.trained = trained

    def run(
        self, host: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return what the module gives for the rows of all parts."""
        plan = self.batch.current()
        parts = plan.parts(self.signs)
        if len(parts) == 1:
            with self._mode(host, parts[0]):
                return forward(*args, **kwargs)
        self._check(host, kwargs)
        length = plan.length((args, kwargs), self.where)
        if length == 1:  # what holds for all rows, such as their positions
            args, kwargs = _repeated((args, kwargs), len(plan.keys))
            length = len(plan.keys)
        results = [
            self._run(host, forward, part, *plan.taken((args, kwargs), part, length))
            for part in parts
        ]
        fill = any(isinstance(delta, Enter) and not delta.leave for delta in self._acting())
        return plan.joined(parts, results, fill)

    def _acting(self) -> list[Delta]:
        chains = {} if self.mixture is None else self.mixture.changes
        return [delta for chain in chains.values() for delta in chain]

    def _run(
        self, host: nn.Module, forward: Any, part: Plan, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        mixture = self.mixture
        with _within(part), self._mode(host, part):
            if mixture is None:
                return forward(*args, **kwargs)
            args, kwargs = mixture.before(host, args, kwargs)
            return mixture(host, args, kwargs, forward(*args, **kwargs))

    @contextlib.contextmanager
    def _mode(self, host: nn.Module, part: Plan) -> Iterator[None]:
        """Let a normalisation learn statistics from the rows of those alone that train it."""
        if not isinstance(host, _NORM):
            yield
            return
        held, asked = host.training, host.__dict__.get("_peft_asked", host.training)
        host.training = asked and part.sole in self.trained
        try:
            yield
        finally:
            host.training = held

    def _check(self, host: nn.Module, kwargs: dict[str, Any]) -> None:
        reason = None
        if any(kwargs.get(name) is not None for name in CACHES):
            reason = (
                "there is a cache, which its parts would fill differently: pass use_cache=False"
            )
        elif host.training and any(
            getattr(m, "gradient_checkpointing", False) for m in host.modules()
        ):
            reason = "its layers recompute what they gave: switch gradient checkpointing off"
        if reason:
            raise AdapterError(
                f"The rows cannot go apart through `{self.where or 'the model'}`, as their "
                f"adapters need, since {reason}, or run the rows of each adapter by themselves."
            )


@contextlib.contextmanager
def _within(part: Plan) -> Iterator[None]:
    outer = getattr(_RUNNING, "part", None)
    _RUNNING.part = part
    try:
        yield
    finally:
        _RUNNING.part = outer


def overrides(delta: Delta, verb: str) -> bool:
    """Whether a delta, or what it is a part of, has its own way of a verb."""
    own = delta.delta if isinstance(delta, Part) else delta
    return getattr(type(own), verb) is not getattr(Delta, verb)


def _through(
    delta: Delta, base: Callable[..., Any], host: nn.Module, *inputs: Any, **kwargs: Any
) -> Any:
    query, key, value, *mask = inputs
    given = mask[0] if mask else kwargs.pop("attention_mask", None)
    return delta.attend(host, base, query, key, value, given, **kwargs)


def _plain(output: Any) -> bool:
    return isinstance(output, Tensor) and not output.is_nested


def _key(plan: Plan) -> Key:
    return cast(Key, plan.sole)


def _with_equal_keys(results: Sequence[Any]) -> list[Any]:
    """Return what attention gave, its weights with zeros for the keys that others have in front."""
    weights = [result[1] for result in results]
    if not all(isinstance(w, Tensor) for w in weights):
        return list(results)
    keys = max(w.shape[-1] for w in weights)
    return [
        (result[0], F.pad(w, (keys - w.shape[-1], 0)), *result[2:])
        for result, w in zip(results, weights, strict=True)
    ]


def _repeated(value: Any, rows: int) -> Any:
    first = first_tensor(value)

    def repeat(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.expand(rows, *x.shape[1:]) if x is first else x
        if isinstance(x, dict):
            return {k: repeat(v) for k, v in x.items()}
        return type(x)(map(repeat, x)) if type(x) in (tuple, list) else x

    return repeat(value)
