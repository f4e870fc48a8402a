"""A fingerprint of the frozen base, so that an adapter never meets another base unnoticed.

It hashes each frozen tensor's name, shape and up to 64 values at equal distances. The values are
rounded to bfloat16 first: a base has the same fingerprint in float32 and cast to bfloat16. Reading
64 values a tensor takes milliseconds for a model of any size; a base that differs only between the
sampled places is not noticed.

Of a model of transformers the settings in its configuration belong to it: equal weights compute
something else with other epsilons, angles of positions or activations. Those that differ between
equal bases, as they were loaded for one task or another, in one type of numbers or quantised, are
left out. They are kept by name, not hashed, and compared where both sides state them: another
version of transformers states more, or fewer. A file without any is compared by its tensors alone.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_peft.carrying.registry import adapters_of
from lightning_peft.delta import SLOT, plain_name
from lightning_peft.errors import CheckpointError
from lightning_peft.structure.anatomy import is_transformers

if TYPE_CHECKING:
    from lightning_peft.adapter import Adapter

SAMPLES = 64
ALGORITHM = f"sha256 of names, shapes and {SAMPLES} values a tensor in bfloat16"

_OF_LOADING = frozenset(
    {
        "architectures", "attn_implementation", "auto_map", "chunk_size_feed_forward", "dtype",
        "experts_implementation", "finetuning_task", "gradient_checkpointing", "id2label",
        "label2id", "name_or_path", "num_labels", "pretraining_tp", "problem_type",
        "quantization_config", "return_dict", "return_dict_in_generate", "task_specific_params",
        "tie_word_embeddings", "tokenizer_class", "torch_dtype", "torchscript",
        "transformers_version", "transformers_weights", "use_cache", "use_return_dict",
    }
)  # fmt: skip
"""Settings that differ between equal bases; whether words are tied the tensors say."""

_LEFT_OUT = re.compile(r"_.*|output_.*|.*_token_id|.*_plan|.*drop.*|.*init.*|use_.*kernels?")
"""Likewise: private settings, what is returned, tokens that a text ends at or is padded with, how
the model is split, and what acts in training or at the start alone."""


def fingerprint(model: nn.Module, exclude: Collection[str] = ()) -> dict[str, Any]:
    """Return the fingerprint of `model` without what adapters added and without `exclude`.

    Args:
        model: the base, injected or not.
        exclude: names of tensors that are trained in place and thus not part of the frozen base.

    Returns:
        `algorithm`, `sha256` and the number of `tensors` that went in; of a model of transformers
        also its `configuration`, as far as it changes what is computed.
    """
    digest, count = hashlib.sha256(), 0
    for name, tensor in sorted(_frozen(model, exclude)):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(_sample(tensor))
        count += 1
    found = {"algorithm": ALGORITHM, "sha256": digest.hexdigest(), "tensors": count}
    settings = _settings(model)
    return found | ({"configuration": settings} if settings else {})


def fingerprint_for(
    model: nn.Module, exclude: Collection[str], own: "Adapter | None" = None
) -> dict[str, Any]:
    """Return the fingerprint of `model` as it is without its adapters but `own`.

    What those train in place is no part of the base, also while they act.

    Raises:
        AdapterError: the originals of what one of them trains in place were not kept.
    """
    with ExitStack() as stack:
        for other in adapters_of(model).values():
            if other is not own:
                stack.enter_context(other.disabled())
        return fingerprint(model, exclude)


def check_fingerprint(stored: dict[str, Any], present: dict[str, Any], what: str) -> None:
    """Refuse a base other than the one that was trained on.

    Raises:
        CheckpointError: the fingerprints differ.
    """
    if stored["sha256"] != present["sha256"]:
        raise CheckpointError(
            f"{what} was trained on another base: its {stored['tensors']} frozen tensors differ "
            f"from the {present['tensors']} of this one in name, shape or values; load the model "
            "that it was trained on, in the same revision."
        )
    old, new = stored.get("configuration", {}), present.get("configuration", {})
    if differing := sorted(name for name in old.keys() & new.keys() if old[name] != new[name]):
        name = differing[0]
        raise CheckpointError(
            f"{what} was trained on another base: its frozen tensors are those of this one, but "
            f"`{name}` in the model's configuration was {old[name]!r} and is {new[name]!r} here "
            f"({len(differing)} in all); load the model that it was trained on, in the same "
            "revision."
        )


def _frozen(model: nn.Module, exclude: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    tensors = {plain_name(n): t for n, t in model.state_dict(keep_vars=True).items()}
    trained = {id(tensors[name]) for name in exclude if name in tensors}  # a tied one has two names
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and SLOT not in name.split(".") and id(tensor) not in trained:
            yield name, tensor


def _settings(model: nn.Module) -> dict[str, Any]:
    """Return what a configuration says of the computation, by dotted names."""
    config: Any = next((m.config for m in model.modules() if is_transformers(m)), None)
    if config is None:
        return {}
    plain = json.loads(json.dumps(config.to_dict(), default=str))
    return dict(sorted(_stated(plain)))


def _stated(settings: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if name in _OF_LOADING or _LEFT_OUT.fullmatch(name) or value is None:
            continue
        if isinstance(value, dict):
            yield from _stated(value, f"{within}{name}.")
        else:
            yield f"{within}{name}", value


def _sample(tensor: Tensor) -> bytes:
    if tensor.is_meta or not tensor.numel():
        return b""
    flat = tensor.detach().reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64)
    values = flat[places.long().to(flat.device)].cpu()
    if values.is_floating_point():
        values = values.to(torch.bfloat16)
    return values.contiguous().view(torch.uint8).numpy().tobytes()
