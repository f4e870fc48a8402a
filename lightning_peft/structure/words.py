"""What virtual tokens start from: vectors of words, by the word embedding itself."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lightning_peft.deltas.virtual_tokens import Among
from lightning_peft.errors import AdapterError, ConfigError
from lightning_peft.structure.anatomy import base_modules, is_linear

_SAMPLE = 1024
_SIZE_UNKNOWN = 0.02


class Start(NamedTuple):
    """First values for vectors that stand among words, or among the patches of an image."""

    vectors: Tensor
    """`(tokens, d_model)`, never narrower than float32."""

    size: float
    """Root mean square of the entries of a word's vector."""

    among: Among
    """What they stand among."""


def check_tokens(tokens: int, layout: str) -> None:
    """Refuse settings that methods with virtual tokens share.

    Raises:
        ConfigError: there are none, or there is no such layout.
    """
    if tokens < 1:
        raise ConfigError(f"`tokens` must be at least 1, but is {tokens} instead.")
    if layout not in ("clean", "peft"):
        raise ConfigError(f"`layout` must be clean or peft, but is {layout!r} instead.")


def ids_of_text(setting: str, text: str, tokenizer: str) -> tuple[int, ...]:
    """Return the ids of a text, without those that a tokenizer puts around it.

    Raises:
        ConfigError: no tokenizer is named, or it cannot be loaded.
    """
    if not tokenizer:
        raise ConfigError(
            f"`tokenizer` must name a tokenizer to read `{setting}`, but is empty: give the "
            "model's name or folder (its `name_or_path`), or give ids instead of a text."
        )
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"`tokenizer` {tokenizer!r} cannot be loaded: {error}") from error
    ids = tuple(loaded(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise ConfigError(f"`{setting}` must have words, but {text!r} gives no token.")
    return ids


def as_many(ids: Sequence[int], tokens: int) -> tuple[int, ...]:
    """Return `tokens` ids: the given ones, cut or repeated."""
    return tuple(ids[i % len(ids)] for i in range(tokens))


def starting_vectors(host: nn.Module, tokens: int, ids: Sequence[int] | None) -> Start:
    """Return what virtual tokens start from.

    Args:
        host: the word embedding, or the embeddings of an image, which have no words.
        tokens: how many there are.
        ids: of the words to start from, cut or repeated; empty to draw words, None for noise.
    """
    if isinstance(host, nn.TransformerEncoder):
        return _among_states(host, tokens)
    table = getattr(host, "weight", None)
    if table is None:
        return _among_patches(host, tokens)
    dtype = torch.promote_types(table.dtype, torch.float32) if table.is_floating_point() else None
    if table.is_meta:
        return Start(table.new_empty(tokens, table.shape[1], dtype=dtype), _SIZE_UNKNOWN, "words")
    drawn = _vectors(host, torch.randint(len(table), (_SAMPLE,), device=table.device))
    size = float(drawn.square().mean().sqrt())
    if ids is None:
        return Start(torch.randn_like(drawn[:1].expand(tokens, -1)) * size, size, "words")
    if not ids:
        return Start(_vectors(host, _words(host, tokens)), size, "words")
    if wrong := [i for i in ids if not 0 <= i < len(table)]:
        raise AdapterError(
            f"`init_ids` must lie in [0, {len(table)}), the model's vocabulary, but {wrong[0]} "
            "does not: take the model's own tokenizer."
        )
    repeated = torch.tensor(as_many(ids, tokens), device=table.device)
    return Start(_vectors(host, repeated), size, "words")


def _words(host: Any, tokens: int) -> Tensor:
    drawn = torch.randint(len(host.weight), (tokens,), device=host.weight.device)
    padding = getattr(host, "padding_idx", None)  # its vector is zero and says nothing
    return (
        drawn
        if padding is None
        else torch.where(drawn == padding, padding + 1, drawn) % len(host.weight)
    )


@torch.no_grad()
def _vectors(host: nn.Module, ids: Tensor) -> Tensor:
    # By the module and not by its weight: some tables multiply or normalise their rows.
    given = host(ids)
    rows: Tensor = given[0] if isinstance(given, tuple) else given
    return rows.detach().clone().to(torch.promote_types(rows.dtype, torch.float32))


def _among_states(host: nn.TransformerEncoder, tokens: int) -> Start:
    weight = cast(Tensor, host.get_parameter("layers.0.linear1.weight"))
    dtype = torch.promote_types(weight.dtype, torch.float32)
    start = torch.empty(tokens, weight.shape[1], dtype=dtype, device=weight.device)
    return Start(start if start.is_meta else start.normal_(), 1.0, "states")  # as normalised ones


def _among_patches(host: nn.Module, tokens: int) -> Start:
    kinds = (nn.Conv2d, nn.Conv3d)
    projections = [m for _, m in base_modules(host) if isinstance(m, kinds) or is_linear(m)]
    weight = cast(Tensor, projections[0].weight)
    fan = weight[0].numel() + weight.shape[0]  # as visual prompt tuning has it (Jia et al. 2022)
    size = (2 / fan) ** 0.5
    dtype = torch.promote_types(weight.dtype, torch.float32)
    start = torch.empty(tokens, weight.shape[0], dtype=dtype, device=weight.device)
    return Start(start if start.is_meta else start.normal_(std=size), size, "patches")
