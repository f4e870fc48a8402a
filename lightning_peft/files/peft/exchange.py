"""Whole folders in peft's format, by the spellings: what to write, and what was read."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapter import Adapter
from lightning_peft.delta import plain_name
from lightning_peft.errors import AdapterError, near_misses
from lightning_peft.files.peft import in_place, spellings
from lightning_peft.files.peft.settings import Settings
from lightning_peft.files.peft.spelling import (
    Different,
    Entry,
    Inexpressible,
    Part,
    Spelling,
    State,
)
from lightning_peft.method import Method
from lightning_peft.structure.anatomy import is_transformers, under

VERSION = "0.21.2"
"""The version of peft whose format this is."""

_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


@dataclass(frozen=True)
class Spelled:
    """One part of an adapter in peft's format."""

    part: Part
    spelling: Spelling
    config: dict[str, Any]
    """What `adapter_config.json` holds."""

    entries: list[Entry]

    def tensors(self, state: State) -> dict[str, Tensor]:
        """Return peft's tensors, given ours.

        Raises:
            Inexpressible: a value cannot be written.
        """
        written = {e.theirs: e.write(state) for e in self.entries if e.written}
        return {key: tensor.detach().cpu().contiguous() for key, tensor in written.items()}

    def holds(self, state: State) -> bool:
        """Whether what is written gives all of our tensors back, bit by bit.

        A tensor that peft's format rounds is kept beside it, under our key.
        """
        own = {e.ours: e for e in self.entries if e.ours is not None}
        if not self.spelling.lossless or own.keys() != state.keys():
            return False
        pairs = ((state[name], e.read(e.write(state))) for name, e in own.items() if e.exact)
        return all(torch.equal(ours, back.to(ours.dtype)) for ours, back in pairs)

    def respelled(self, tensors: State) -> dict[str, Tensor]:
        """Return our tensors from those that `tensors` and `rounded` gave.

        Raises:
            AdapterError: one is missing, unexpected, or cannot be what it should be.
        """
        kept = {name: tensors[name] for name in self.rounded() if name in tensors}
        theirs = {key: tensor for key, tensor in tensors.items() if key not in kept}
        return unspell(self.entries, theirs, self.part.adapter.tensors()) | kept

    def rounded(self) -> list[str]:
        """Return our keys of what peft's format rounds."""
        return [e.ours for e in self.entries if e.ours is not None and not e.exact]


def spell(adapter: Adapter, part: str | None = None, check: bool = True) -> Spelled:
    """Return an adapter, or one part of a combination, in peft's format.

    Args:
        adapter: which is present and enabled.
        part: the kind of the method to write; None where the adapter has one.
        check: whether to find out, where only running the model tells, if peft computes the same.

    Raises:
        Inexpressible: peft cannot hold it; the message says why.
    """
    one, spelling = _chosen(adapter, part)
    _refuse_passed_over(one)
    own, entries = spelling.config(one), spelling.entries(one)
    if check:
        spelling.check(one)
    trained = _in_place(one)
    covered = [e.ours for e in entries if e.ours in trained]
    modules = in_place.saved_modules(adapter.model, trained, covered, one.deltas)
    saved = in_place.patterns_of(adapter.model, modules, one.deltas)
    entries = _with_modules(one, entries, modules, spelling.base)
    _refuse_left_out(one, entries)
    config = _common(adapter.model, spelling, modules) | own
    if not spelling.saves_modules and config["task_type"] in ("TOKEN_CLS", "QUESTION_ANS"):
        config["task_type"] = None  # peft would look for what such a configuration lacks
    if spelling.saves_modules:
        config["modules_to_save"] = saved or None
    elif not {*saved} <= {*in_place.HEADS.get(str(config["task_type"]), ())}:
        raise Inexpressible(f"peft does not train `{modules[0]}` in place beside this method.")
    return Spelled(one, spelling, dict(sorted(config.items())), entries)


def spelling_of(settings: Settings) -> Spelling:
    """Return the spelling that reads a configuration.

    Raises:
        CheckpointError: there is none.
    """
    kind = settings.peek("peft_type")
    known = sorted({spelling.peft_type for spelling in spellings()})
    if not isinstance(kind, str) or kind not in known:
        raise settings.refusal(
            "peft_type", f"must be one of {', '.join(known)}{near_misses(str(kind), known)}"
        )
    fits = [s for s in spellings() if s.peft_type == kind and s.reads(settings)]
    if not fits:
        raise settings.refusal("peft_type", "describes a variant that we do not have")
    return fits[0]


@dataclass(frozen=True)
class Described:
    """What a folder of peft's describes, for a given base."""

    spelling: Spelling
    methods: tuple[Method, ...]
    modules: list[str]
    """What is trained in place, as whole modules."""

    in_place: list[str]
    """The names of their parameters."""


def describe(settings: Settings, keys: Sequence[str], model: nn.Module) -> Described:
    """Return the methods of a configuration, and what it trains in place.

    Raises:
        CheckpointError: a setting cannot be honoured.
        TargetError: a pattern is none.
    """
    spelling = spelling_of(settings)
    made = spelling.method(settings, keys, model)
    modules = in_place.found_in(settings, keys, model, spelling.base)
    settings.finish()
    methods = (made,) if isinstance(made, Method) else tuple(made)
    return Described(spelling, methods, modules, in_place.parameters_of(model, modules))


def read(described: Described, adapter: Adapter, tensors: State) -> dict[str, Tensor]:
    """Return the adapter's state from peft's tensors, every one of which is accounted for.

    Raises:
        AdapterError: one is missing, unexpected, or cannot be what it should be.
    """
    spelling, part = described.spelling, Part(adapter, adapter.methods[0])
    entries = _with_modules(part, spelling.entries(part), described.modules, spelling.base)
    known = {entry.theirs for entry in entries}
    tensors = in_place.without_copies(tensors, described.modules, spelling.base)
    extra = (in_place.base_tensor(adapter.model, k, spelling.base) for k in {*tensors} - known)
    entries += [entry for entry in extra if entry is not None]
    return spelling.derived(part) | unspell(entries, tensors, adapter.tensors())


def require_same(described: Described, adapter: Adapter) -> None:
    """Refuse what peft has been seen to compute otherwise than the adapter that was read.

    Raises:
        Different: it has been.
    """
    try:
        described.spelling.check(Part(adapter, adapter.methods[0]))
    except Different:
        raise
    except Inexpressible:  # a comparison that cannot be made refuses nothing that was read
        return


def unspell(entries: Sequence[Entry], tensors: State, present: State) -> dict[str, Tensor]:
    """Return our tensors from peft's, every one of which is accounted for.

    Args:
        entries: of all that may be there.
        tensors: peft's.
        present: ours as they are.

    Raises:
        AdapterError: one is missing, unexpected, or cannot be what it should be.
    """
    known = {entry.theirs: entry.optional for entry in entries}
    extra = sorted(tensors.keys() - known.keys())
    missing = sorted(k for k, optional in known.items() if k not in tensors and not optional)
    if extra:
        raise AdapterError(
            f"`{extra[0]}` is unexpected ({len(extra)} in all).{near_misses(extra[0], missing)}"
        )
    if missing:
        raise AdapterError(f"`{missing[0]}` is missing ({len(missing)} in all).")
    state = {}
    for entry in (e for e in entries if e.theirs in tensors):  # several may share one of theirs
        key, tensor = entry.theirs, tensors[entry.theirs]
        if entry.ours is not None:
            _check_values(key, tensor, present[entry.ours])
        try:
            own = entry.read(tensor)
        except (IndexError, TypeError, RuntimeError, ValueError) as error:
            if isinstance(error, AdapterError):
                raise
            raise AdapterError(f"`{key}` of shape {tuple(tensor.shape)} does not fit.") from error
        if entry.ours is not None:
            state[entry.ours] = own.contiguous()
    return state


def _check_values(key: str, tensor: Tensor, own: Tensor) -> None:
    """Refuse a tensor that is no plain number where ours are, or not finite."""
    if own.is_floating_point() and tensor.dtype not in _PLAIN:
        raise AdapterError(
            f"`{key}` must be of a floating-point type, but is {tensor.dtype} instead."
        )
    if not tensor.isfinite().all():
        raise AdapterError(f"`{key}` holds NaN or infinite values.")


def _chosen(adapter: Adapter, kind: str | None) -> tuple[Part, Spelling]:
    """Return the part of an adapter to write, and its spelling."""
    kinds = [method.kind for method in adapter.methods]
    if kind is not None and kinds.count(kind) != 1:
        raise Inexpressible(f"`part` must name one of {', '.join(kinds)}, but is {kind!r} instead.")
    part = Part(adapter, adapter.methods[kinds.index(kind) if kind is not None else 0])
    spelling = next((s for s in spellings() if s.writes(part)), None)
    if spelling is None:
        raise Inexpressible(f"peft has no counterpart of {type(part.method).__name__}.")
    if kind is None and {*kinds[1:]} - {*spelling.companions}:
        raise Inexpressible(
            f"peft has no combination of methods, and this adapter has {', '.join(kinds)}: export "
            f"one of them alone, with part={kinds[0]!r}."
        )
    return part if kind is None else dataclasses.replace(part, alone=True), spelling


def _refuse_passed_over(part: Part) -> None:
    """Refuse hosts that torch's fast path reads past, so that peft's change of them is lost."""
    every = part.model.named_modules()
    layers = [plain_name(n) for n, m in every if isinstance(m, nn.TransformerEncoderLayer)]
    inside = [host for host in part.deltas if under(host, tuple(layers))]
    changed = {*part.deltas, *(name.rpartition(".")[0] for name in part.adapter.in_place)}
    if several := sorted(changed & _shared_modules(part.model)):
        raise Inexpressible(
            f"`{several[0]}` is a part of several modules, and peft would change it in one of them."
        )
    if inside:
        raise Inexpressible(
            f"`{inside[0]}` lies in a `nn.TransformerEncoderLayer`, which in eval mode reads "
            "weights past peft's layers, so the change would be lost there."
        )


def _refuse_left_out(part: Part, entries: Sequence[Entry]) -> None:
    """Refuse to leave out what training has changed beside what is trained (running statistics)."""
    owners = {name.rpartition(".")[0] for name in _in_place(part)}
    changed = {n for n in part.adapter.tensors() if n.rpartition(".")[0] in owners}
    if left := sorted(changed - {entry.ours for entry in entries}):
        raise Inexpressible(f"peft does not keep `{left[0]}` of what is trained so.")


def _shared_modules(model: nn.Module) -> set[str]:
    """Return the names of modules that are children of more than one module."""
    parents = Counter(id(child) for parent in model.modules() for child in parent.children())
    return {plain_name(n) for n, module in model.named_modules() if parents[id(module)] > 1}


def _in_place(part: Part) -> list[str]:
    """Return what is trained in place, without what other methods of the adapter train."""
    others = [m for m in part.adapter.methods if m is not part.method and part.alone]
    theirs = {name for method in others for name in method.in_place(part.model)}
    own = set(part.method.in_place(part.model)) if theirs else set()
    return [name for name in part.adapter.in_place if name not in theirs - own]


def _with_modules(
    part: Part, entries: Sequence[Entry], modules: Sequence[str], base: str
) -> list[Entry]:
    """Return the entries with those of modules that are trained in place as a whole."""
    free = [e for e in entries if not under((e.ours or "").rpartition(".")[0], tuple(modules))]
    return free + in_place.entries_of(part.model, modules, _in_place(part), base)


def _common(model: nn.Module, spelling: Spelling, modules: Sequence[str]) -> dict[str, Any]:
    source, task = getattr(model, "config", None), _task(model, modules)
    known = task is None and is_transformers(model)
    kind = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    return {
        "auto_mapping": kind if known else None,
        "base_model_name_or_path": str(getattr(source, "name_or_path", "") or "") or None,
        "inference_mode": True,
        "peft_type": spelling.peft_type,
        "peft_version": VERSION,
        "revision": None,
        "task_type": task,
    }


def _task(model: Any, modules: Sequence[str]) -> str | None:
    """Return peft's name of the model's task, where it would train what we did and no more."""
    name = type(model).__name__
    task = next((task for end, task in _TASKS.items() if name.endswith(end)), None)
    if task == "SEQ_2_SEQ_LM" and not getattr(model.config, "is_encoder_decoder", False):
        return None
    heads = in_place.HEADS.get(str(task), ())
    implied = {n for n, _ in model.named_modules() if heads and n.endswith(heads)}
    return task if implied <= {*modules} else None
