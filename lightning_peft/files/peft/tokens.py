"""What files with virtual tokens and with prefixes have in common, and a rehearsal of peft's run.

peft does not change modules for these: it wraps the model in a class for its task, which puts
vectors before the text or keys and values into the cache. Whether that computes what our adapter
does is found by doing both on a short text, and not by a list of architectures.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from lightning_peft.delta import Delta, slot_of
from lightning_peft.errors import CheckpointError, PEFTError
from lightning_peft.files.peft import in_place
from lightning_peft.files.peft.settings import Settings
from lightning_peft.files.peft.spelling import Different, Entry, Inexpressible, Part
from lightning_peft.structure import anatomy
from lightning_peft.structure.anatomy import base_modules, under
from lightning_peft.structure.probe import tensors_of, untouched, words_of

ROOT = "base_model."
"""What peft puts before the name of a module that it trains in place beside virtual tokens."""

EMBEDDINGS = "prompt_embeddings"
"""The one tensor of these files."""

SEQ2SEQ = "SEQ_2_SEQ_LM"
"""peft's name of the task of an encoder-decoder that writes."""

_TASKS = {
    "SEQ_CLS": "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLS": "TOKEN_CLASSIFICATION",
    "QUESTION_ANS": "QUESTION_ANSWERING",
    SEQ2SEQ: "SEQ_TO_SEQ_CAUSAL_LM",
    "CAUSAL_LM": "CAUSAL_LM",
}
_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 2e-2}
_LENGTH = 6


def common(
    part: Part, tokens: int, token_dim: int, heads: int, layers: int, parts: int = 1
) -> dict[str, Any]:
    """Return the settings that all of these methods have.

    Args:
        part: the method.
        tokens: how many there are.
        token_dim: the width of one in one layer.
        heads: the number of attention heads that share it.
        layers: the number of layers.
        parts: into how many parts of the model they go.

    Raises:
        Inexpressible: peft would not find them for this model.
    """
    return {
        "num_attention_heads": heads,
        "num_layers": layers,
        "num_transformer_submodules": parts,
        "num_virtual_tokens": tokens,
        "task_type": task_of(part.model),
        "token_dim": token_dim,
    }


def task_of(model: Any) -> str:
    """Return peft's name of the task that a model is for.

    Raises:
        Inexpressible: it is for none in which peft puts anything before a text.
    """
    from transformers.models.auto import modeling_auto

    classes = {cls.__name__ for cls in type(model).__mro__}
    for task, name in _TASKS.items():
        if task == SEQ2SEQ and not is_encoder_decoder(model):
            continue  # some that put sounds or images before a text are in its list too
        if classes & _known(getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES")):
            return task
    if classes & _known(modeling_auto.MODEL_MAPPING_NAMES):
        return "FEATURE_EXTRACTION"
    raise Inexpressible(
        f"peft puts nothing before the text of a {type(model).__name__}: it has no task for it."
    )


def with_head(part: Part, entries: list[Entry]) -> list[Entry]:
    """Return the entries, and those of a head that is not trained: peft will not load without."""
    ends = in_place.HEADS.get(task_of(part.model), ())
    modules = [
        name for name, _ in base_modules(part.model) if name and ends and name.endswith(ends)
    ]
    frozen = [m for m in modules if not any(under(n, (m,)) for n in part.adapter.in_place)]
    return entries + in_place.entries_of(part.model, frozen, (), ROOT)


def is_encoder_decoder(model: Any) -> bool:
    """Whether a model says that it is one."""
    return getattr(getattr(model, "config", None), "is_encoder_decoder", False) is True


def read_tokens(settings: Settings, model: Any, crossing: Sequence[int]) -> int:
    """Return the number of virtual tokens in a configuration.

    Args:
        settings: of the file.
        model: the base.
        crossing: into how many parts of an encoder-decoder peft can take them to go.

    Raises:
        CheckpointError: peft itself would not use them, or the file is for another kind of model.
    """
    if settings.peek("task_type") not in (*_TASKS, "FEATURE_EXTRACTION"):
        raise settings.refusal(
            "task_type", "must name a task, without which peft leaves virtual tokens out,"
        )
    settings.ignore("num_attention_heads", "num_layers", "token_dim")
    parts = crossing if settings.peek("task_type") == SEQ2SEQ else (1,)
    if settings.take("num_transformer_submodules", parts[-1]) not in parts:
        raise settings.refusal(
            "num_transformer_submodules", f"must be {' or '.join(map(str, parts))} for its task"
        )
    _check_task(settings, model)
    tokens = settings.take("num_virtual_tokens", 0)
    if tokens < 1:
        raise settings.refusal("num_virtual_tokens", "must be at least 1")
    return tokens


def deltas_of(part: Part, kind: type[Delta]) -> dict[str, Any]:
    """Return the method's deltas of one kind by the name of their host."""
    return {host: delta for host, delta in part.deltas.items() if isinstance(delta, kind)}


def text_config(model: Any, *names: str) -> int:
    """Return the first of these numbers that a model's configuration has, else 1."""
    config = model.config.get_text_config()
    numbers = (getattr(config, name, None) for name in names)
    return next((n for n in numbers if isinstance(n, int) and n > 0), 1)


def layers_of(model: Any) -> int:
    """Return how many layers a model's largest stack has."""
    return len(anatomy.layers(model))


def short_text(model: Any) -> dict[str, Tensor]:
    """Return a text for a rehearsal, as a model takes it."""
    ids = torch.tensor([words_of(model)[-_LENGTH:]], device=model.device)
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    crossing = getattr(model.config, "is_encoder_decoder", False)
    return text | ({"decoder_input_ids": ids} if crossing else {})


def rehearsable(model: Any) -> bool:
    """Whether a model can be run by one process, which several that share it must not do."""
    several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    return not several and model.device.type != "meta"


@contextmanager
def rehearsal(model: Any) -> Iterator[None]:
    """Run a model in this context, uncompiled and without a trace; errors become refusals.

    Raises:
        Inexpressible: whatever the model's code raised.
    """
    try:
        with untouched(model), torch.compiler.set_stance("force_eager"):
            yield
    except PEFTError:
        raise
    except Exception as error:
        raise Inexpressible(
            f"Whether peft computes the same could not be found out, since "
            f"{type(model).__name__} cannot be run as peft does: {type(error).__name__}: {error}"
        ) from error


@contextmanager
def acting(part: Part, active: bool) -> Iterator[None]:
    """Run in this context with one method of an adapter, or without; all else stays as it is."""
    key = f"{part.adapter.name}_{part.method.kind}"
    before = {host: delta.active for host, delta in part.deltas.items()}
    try:
        for host in before:
            slot_of(part.host(host)).let_act(key, active)
        yield
    finally:
        for host, was in before.items():
            slot_of(part.host(host)).let_act(key, was)


def require_equal(part: Part, ours: Any, theirs: Any, tokens: int, why: str) -> None:
    """Refuse where what a model gives differs from what it would give under peft.

    Args:
        part: the method.
        ours: what the model gives with our adapter.
        theirs: what it gives as peft runs it; there it may have `tokens` entries more in front.
        tokens: how many virtual tokens there are.
        why: the end of the refusal's sentence.

    Raises:
        Different: they do.
    """
    pairs = zip(tensors_of(ours), tensors_of(theirs), strict=False)
    for number, (own, other) in enumerate(pairs):
        cut = other[:, tokens:] if _is_longer(other, own, tokens) else other
        if own.shape != cut.shape and number:
            continue  # states of another part, which the tokens stay in
        difference = _difference(own, cut)
        if difference > _TOLERANCE.get(own.dtype, 1e-4):
            raise Different(
                f"In peft {type(part.model).__name__} would give something else, {difference:.1%} "
                f"away on a short text: {why}"
            )


def _check_task(settings: Settings, model: Any) -> None:
    task = settings.peek("task_type")
    if (task == SEQ2SEQ) != _is_seq2seq(model):
        raise CheckpointError(
            f"`{settings.where}` is for the task {task}, for which {type(model).__name__} is not: "
            "load the class of model that it was trained in."
        )


def _is_longer(other: Tensor, own: Tensor, tokens: int) -> bool:
    return other.dim() > 1 and own.dim() > 1 and other.shape[1] == own.shape[1] + tokens


def _difference(own: Tensor, other: Tensor) -> float:
    if own.shape != other.shape:
        return float("inf")
    scale = other.detach().double().norm().clamp(min=1e-12)
    return float((own.double() - other.double()).norm() / scale)


def _known(names: Mapping[str, Any]) -> set[str]:
    several = [name if isinstance(name, (tuple, list)) else (name,) for name in names.values()]
    return {name for group in several for name in group}


def _is_seq2seq(model: Any) -> bool:
    try:
        return task_of(model) == SEQ2SEQ
    except Inexpressible:
        return False
