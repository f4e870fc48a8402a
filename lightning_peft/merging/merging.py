"""Merging with a certificate: an adapter is folded into the weights only if the outputs stay.

    relative difference = ‖merged - unmerged‖₂ / ‖unmerged‖₂

of the logits on real inputs, which must not exceed the tolerance of the model's dtype. Otherwise
the weights are put back, bitwise. What was merged can be taken out again, bitwise too.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lightning_peft.adapter import Adapter
from lightning_peft.carrying.registry import Forgetful, adapters_of, modules_of
from lightning_peft.config import to_spec
from lightning_peft.delta import SLOT, Delta, NotMergeable, slot_of
from lightning_peft.errors import AdapterError
from lightning_peft.merging.certificate import (
    Batch,
    Certificate,
    Inputs,
    batches_of,
    cast_to,
    compare,
    count_rows,
    logits_of,
    precision,
)
from lightning_peft.merging.folding import forget_base
from lightning_peft.merging.quantised import is_quantised, opened, way_back
from lightning_peft.structure.probe import untouched


class MergeRefused(NotMergeable):
    """The merged model would compute something else; it was left unmerged.

    Attributes:
        certificate: what was measured.
    """

    def __init__(self, message: str, certificate: "Certificate") -> None:
        super().__init__(message)
        self.certificate = certificate


class Merged:
    """A model with an adapter folded into its weights, and the way back.

    Attributes:
        model: the model, now a plain one unless it carries other adapters.
        certificate: what was measured.
    """

    def __init__(self, adapter: Adapter, certificate: Certificate, back: "_WayBack") -> None:
        self.model, self.certificate = adapter.model, certificate
        self._adapter, self._back = adapter, back

    def __repr__(self) -> str:
        found = self.certificate
        return (
            f"Merged({found.adapter!r}, {found.dtype}, relative difference {found.relative:.1e} of "
            f"at most {found.tolerance:.0e})"
        )

    def unmerge(self) -> Adapter:
        """Put the weights back, bitwise, and return the adapter, in the model again.

        Raises:
            AdapterError: the model was changed since, or unmerged already.
        """
        kept = _kept_by(self._adapter)
        if kept.get("merged") is not self:
            raise AdapterError(f"Adapter `{self.certificate.adapter}` is not merged any more.")
        adapter = self._back.go()
        kept.clear()
        return adapter


def _kept_by(adapter: Adapter) -> Forgetful:
    """Return where an adapter keeps what became of it, as long as it is merged; a copy has none."""
    return cast(Forgetful, adapter.__dict__.setdefault("_merging", Forgetful()))


def merge(adapter: Adapter, inputs: Inputs | None = None, *, tokenizer: Any = None) -> Merged:
    """Fold an adapter into the weights of its model, and certify that the outputs stay.

    Where the model is quantised, the changed weights are unpacked, changed and quantised anew.
    Merging what is merged already does nothing.

    Args:
        adapter: an active one.
        inputs: batches to compare on, by the names of the model's arguments: real inputs of the
            task. None takes sentences of our own with the `tokenizer`, or random tokens.
        tokenizer: of the model.

    Returns:
        The merged model with its certificate, and the way back.

    Raises:
        NotMergeable: a part cannot be folded in; nothing is changed.
        MergeRefused: the outputs would change by more than the tolerance; nothing is changed.
        AdapterError: the adapter is inactive, or the model needs `inputs`.
    """
    if earlier := _kept_by(adapter).get("merged"):
        return cast(Merged, earlier)
    _refuse_inactive(adapter)
    batches = batches_of(adapter.model, inputs, tokenizer)
    back = _WayBack(adapter)
    certificate = _folded(adapter, batches, back)
    if not certificate.passed:
        back.restore_weights()
        raise MergeRefused(_too_far(certificate), certificate)
    adapter.forget(hand_back=False)
    back.note_merged()
    _kept_by(adapter)["merged"] = merged = Merged(adapter, certificate, back)
    return merged


def measure(
    adapter: Adapter,
    dtype: torch.dtype,
    inputs: Inputs | None = None,
    *,
    tokenizer: Any = None,
) -> Certificate:
    """Return what merging would do to the logits of the model in another dtype, on a copy of it.

    Raises:
        NotMergeable: a part cannot be folded in.
        AdapterError: the adapter is inactive, or the model needs `inputs`.
    """
    _refuse_inactive(adapter)
    if any(map(is_quantised, adapter.model.parameters())):
        raise AdapterError(f"`dtype` must be that of a quantised model, but is {dtype} instead.")
    batches = batches_of(adapter.model, inputs, tokenizer)
    twin = adapters_of(copy.deepcopy(adapter.model).to(dtype))[adapter.name]
    return _folded(twin, [cast_to(batch, dtype) for batch in batches], _WayBack(twin))


class Weight(NamedTuple):
    """A weight as it was at one time."""

    name: str
    parameter: Tensor
    place: int
    sums: Tensor | None
    """Of the bits of its values, row by row; None where it is quantised."""

    @classmethod
    def of(cls, name: str, parameter: Tensor, values: Tensor) -> "Weight":
        """Return what a parameter is now, which has these values."""
        if is_quantised(parameter):
            return cls(name, parameter, id(parameter), None)
        whole = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
        bits = values.detach().view(whole[values.element_size()])
        return cls(name, parameter, values.data_ptr(), bits.sum(-1) if bits.dim() else bits)

    def equals(self, other: "Weight") -> bool:
        """Whether it is still the same parameter with the same values in the same place."""
        if self.parameter is not other.parameter or self.place != other.place:
            return False
        return self.sums is None or other.sums is None or torch.equal(self.sums, other.sums)


class _WayBack:
    """What a model and an adapter were before they were merged."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter, self.model = adapter, adapter.model
        hosts, modules = {n: host for n, host, _ in adapter.deltas}, modules_of(adapter.model)
        owners = {name.rpartition(".")[0] for name in adapter.in_place}
        self.hosts = hosts | {name: modules[name] for name in owners}
        self.restores = [way_back(host) for host in self.hosts.values()]
        kinds = {id(d): m.kind for m in adapter.methods for d in adapter.deltas_of(m).values()}
        self.deltas = [(n, f"{adapter.name}_{kinds[id(d)]}", d) for n, _, d in adapter.deltas]
        self.state = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
        self.trainable, self.bases = adapter.trainable, self._bases()
        self.merged: list[Weight] = []
        self.around: dict[str, bool] = {}

    def restore_weights(self) -> None:
        """Put back what the hosts had in their weights."""
        for restore in self.restores:
            restore()
        forget_base(self.model)

    def note_merged(self) -> None:
        """Remember what the merged model is, so that a change of it is seen."""
        self.merged = self._present()
        self.around = {name: other.active for name, other in adapters_of(self.model).items()}

    def go(self) -> Adapter:
        """Put everything back."""
        self._refuse_changed()
        for rival in self._rivals():
            rival.deactivate()
        self.restore_weights()
        for tensor, data in self.bases:
            tensor.data = data
        old = self.adapter
        again = Adapter(self.model, old.name, old.methods, self.deltas, old.in_place)
        again.load_state_dict(self.state)
        for name, active in self.around.items():
            if active:
                adapters_of(self.model)[name].activate()
        return again.requires_grad_(self.trainable)

    def _present(self) -> list[Weight]:
        """Return the hosts' weights, without what others have in place of the adapter's own."""
        replaced = {
            (owner, name): tensor
            for rival in self._rivals()
            for owner, tensors in rival.replaced("unmerge()").items()
            for name, tensor in tensors.items()
        }
        return [
            Weight.of(f"{at}.{name}".lstrip("."), p, replaced.get((at, name), p))
            for at, host in self.hosts.items()
            for name, p in host._parameters.items()
            if p is not None
        ]

    def _rivals(self) -> list[Adapter]:
        """Return the active adapters that train the same in place, which were not when it was."""
        own, others = set(self.adapter.in_place), adapters_of(self.model).values()
        return [a for a in others if a.active and a.model is self.model and own & {*a.in_place}]

    def _refuse_changed(self) -> None:
        present, others = self._present(), adapters_of(self.model)
        pairs = zip(present, self.merged, strict=False)
        changed = [now.name for now, then in pairs if not now.equals(then)]
        if len(present) != len(self.merged) or changed or self.around.keys() != others.keys():
            named = f" (`{changed[0]}` and {len(changed) - 1} more)" if changed else ""
            raise AdapterError(
                f"Adapter `{self.adapter.name}` cannot be taken out again: since it was merged, "
                f"the model has got other weights or other adapters{named}; undo that first."
            )

    def _bases(self) -> list[tuple[Tensor, Tensor]]:
        """Return what the base has where the adapter trains in place."""
        if not all(method.keeps_original for method in self.adapter.methods):
            return []
        with self.adapter.disabled():
            present: dict[str, Any] = self.model.state_dict(keep_vars=True)
            own = [present[name] for name in self.state if SLOT not in name.split(".")]
            return [(tensor, tensor.data) for tensor in own]


@torch.no_grad()
def _folded(adapter: Adapter, batches: Sequence[Batch], back: _WayBack) -> Certificate:
    """Fold the adapter in, measure, and leave it folded in; undo that when it cannot be."""
    model = adapter.model
    dtype, tolerance = precision(model)
    with untouched(model):
        before = logits_of(model, batches)
        with _silent(adapter):
            bare = logits_of(model, batches)
        try:
            _fold(adapter)
            with _silent(adapter):
                after = logits_of(model, batches)
        except BaseException:
            back.restore_weights()
            raise
    absolute, relative = compare(before, after)
    return Certificate(
        adapter=adapter.name,
        methods=[to_spec(method) for method in adapter.methods],
        scale=adapter.scale,
        dtype=dtype,
        rows=sum(map(count_rows, batches)) or 1,  # the model's own few tokens
        absolute=absolute,
        relative=relative,
        tolerance=tolerance,
        effect=compare(before, bare)[1],
        weights=sorted(back.hosts),
    )


def _fold(adapter: Adapter) -> None:
    try:
        adapter.fold(opened)
    except NotMergeable as error:
        raise NotMergeable(f"{error} {_parts(adapter)}".rstrip()) from error


def _parts(adapter: Adapter) -> str:
    """Say which of several methods cannot be merged, and what to do."""
    stuck = [m for m in adapter.methods if any(map(_has_no_weight, adapter.deltas_of(m).values()))]
    rest = [method for method in adapter.methods if method not in stuck]
    if not stuck:
        return ""
    kinds = ", ".join(f"`{method.kind}`" for method in stuck)
    others = ", ".join(f"`{method.kind}`" for method in rest)
    remedy = f"of the adapter's methods, {others} alone could be merged; " if rest else ""
    return (
        f"No weight of the model can hold what {kinds} does: {remedy}keep the adapter beside the "
        "model with `save`."
    )


def _has_no_weight(delta: Delta) -> bool:
    return type(delta).merge is Delta.merge


@contextmanager
def _silent(adapter: Adapter) -> Iterator[None]:
    """Let the deltas do nothing; what is trained in place stays."""
    acting = [(host, delta) for _, host, delta in adapter.deltas if delta.active]
    for host, delta in acting:
        delta.active = False
        slot_of(host).refresh()
    try:
        yield
    finally:
        for host, delta in acting:
            delta.active = True
            slot_of(host).refresh()


def _refuse_inactive(adapter: Adapter) -> None:
    if adapters_of(adapter.model).get(adapter.name) is adapter and not adapter.active:
        raise AdapterError(
            f"Adapter `{adapter.name}` is not active, so the model does not compute what it would "
            "be merged for: call its `activate()` first."
        )


def _too_far(found: Certificate) -> str:
    return (
        f"Adapter `{found.adapter}` was not merged: the logits of {found.rows} rows would change "
        f"by {found.relative:.1e} of their norm ({found.absolute:.1e} at most), but "
        f"{found.tolerance:.0e} is the limit in {found.dtype}. Merge it into the base in float32, "
        "or keep it beside the model."
    )
