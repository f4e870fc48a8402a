"""A merged model as a plain Hugging Face folder, beside a record of what merging did to it."""

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_peft.carrying.registry import adapters_of
from lightning_peft.errors import AdapterError, CheckpointError
from lightning_peft.merging.certificate import (
    Batch,
    Certificate,
    Inputs,
    batches_of,
    compare,
    logits_of,
    precision,
)
from lightning_peft.merging.quantised import is_quantised
from lightning_peft.structure.anatomy import is_transformers
from lightning_peft.structure.probe import untouched

RECORD = "merge.json"


def write_merged(
    model: Any,
    folder: str | Path,
    certificates: Sequence[Certificate],
    inputs: Inputs | None = None,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a merged model to `folder`, load it back, and keep it only if it computes the same.

    Args:
        model: of transformers, with no adapter left on it; it is left as it is.
        folder: where to; it must not exist.
        certificates: what `merge` and `measure` found.
        inputs: batches to compare on, as in `merge`.
        tokenizer: is written beside the model.
        dtype: of the weights in the files; None keeps the model's own.

    Returns:
        The folder, which `from_pretrained` takes.

    Raises:
        AdapterError: the model is none of transformers, or still carries an adapter.
        CheckpointError: the folder exists or cannot be written, or what is loaded from it computes
            something else.
    """
    folder = Path(folder)
    _refuse(model, folder)
    batches = batches_of(model, inputs, tokenizer)
    part = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        _save(model, part, dtype)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        reloaded = _reloaded(model, part, batches)
        record = {"certificates": [c.to_json() for c in certificates], "reloaded": reloaded}
        (part / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        part.rename(folder)
    except OSError as error:
        raise CheckpointError(f"The model cannot be written to `{folder}`: {error}.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _refuse(model: Any, folder: Path) -> None:
    if not is_transformers(model):
        raise AdapterError(
            f"`model` must be one of transformers, whose folders `from_pretrained` reads, but is "
            f"{type(model).__name__} instead: save its `state_dict()`."
        )
    if present := adapters_of(model):
        raise AdapterError(f"`model` still carries {', '.join(present)}: merge or remove it first.")
    if folder.exists():
        raise CheckpointError(f"`{folder}` must not exist yet, but does: choose another.")


def _save(model: Any, folder: Path, dtype: torch.dtype | None) -> None:
    with _as_plain(model), _in_dtype(model, dtype), _quietly():
        model.save_pretrained(folder)


@contextmanager
def _as_plain(model: Any) -> Iterator[None]:
    """Let a base that came from a GGUF file, whose weights are plain by now, be saved as one."""
    config, quantiser = model.config, getattr(model, "hf_quantizer", None)
    if quantiser is None or any(map(is_quantised, model.parameters())):
        yield
        return
    settings, model.hf_quantizer = config.__dict__.pop("quantization_config", None), None
    try:
        yield
    finally:
        model.hf_quantizer = quantiser
        config.quantization_config = settings


@contextmanager
def _in_dtype(model: Any, dtype: torch.dtype | None) -> Iterator[None]:
    """Let the floating-point tensors have another dtype, and put the present ones back."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()] if dtype else []
    before = [(t, t.data) for t in tensors if t.is_floating_point() and not is_quantised(t)]
    for tensor, data in before:
        tensor.data = data.to(dtype)
    try:
        yield
    finally:
        for tensor, data in before:
            tensor.data = data


def _reloaded(model: Any, folder: Path, batches: Sequence[Batch]) -> dict[str, Any]:
    """Return how far what the folder holds is from the model, which must be near enough."""
    with _quietly():
        again: Any = type(model).from_pretrained(
            folder, dtype="auto", attn_implementation=model.config._attn_implementation
        )
    again.to(model.device)
    name, tolerance = precision(again)
    again.to(model.dtype) if name != "quantised" else again
    with untouched(model), untouched(again):
        absolute, relative = compare(logits_of(model, batches), logits_of(again, batches))
    if not relative <= tolerance:
        raise CheckpointError(
            f"The folder was not kept: the model that is loaded from it gives logits that differ by"
            f" {relative:.1e} of their norm, but {tolerance:.0e} is the limit in {name}."
        )
    return {"dtype": name, "absolute": absolute, "relative": relative, "tolerance": tolerance}


@contextmanager
def _quietly() -> Iterator[None]:
    """Show no bars of transformers where no person watches."""
    from transformers.utils import logging

    hidden = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if hidden:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hidden:
            logging.enable_progress_bar()
