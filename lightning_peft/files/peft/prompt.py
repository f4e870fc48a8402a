"""Prompt tuning in peft's format, and every file with vectors that stand before the text."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.deltas.virtual_tokens import Enter, Virtual
from lightning_peft.errors import AdapterError
from lightning_peft.files.peft.settings import Settings
from lightning_peft.files.peft.spelling import Entry, Inexpressible, Part, Spelling
from lightning_peft.files.peft.tokens import (
    EMBEDDINGS,
    ROOT,
    acting,
    common,
    deltas_of,
    layers_of,
    read_tokens,
    rehearsable,
    rehearsal,
    require_equal,
    short_text,
    task_of,
    text_config,
    with_head,
)
from lightning_peft.method import Method
from lightning_peft.methods.prompt_tuning import Prompt, PromptTuning


class PromptSpelling(Spelling):
    """`PromptTuning`: the vectors as they are."""

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    kinds: ClassVar[tuple[str, ...]] = ("prompt",)
    base: ClassVar[str] = ROOT

    def config(self, part: Part) -> dict[str, Any]:
        """Return the settings; how the vectors started is past."""
        settings = before_the_text(part)
        return settings | {
            "prompt_tuning_init": "RANDOM",
            "prompt_tuning_init_text": None,
            "tokenizer_kwargs": None,
            "tokenizer_name_or_path": None,
        }

    def check(self, part: Part) -> None:
        """Compare peft's place of the prompt with ours."""
        check_prompt(part)

    def method(self, settings: Settings, keys: Sequence[str], model: nn.Module) -> Method:
        """Return prompt tuning with peft's layout."""
        settings.ignore(
            "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs",
            "tokenizer_name_or_path",
        )  # fmt: skip
        return prompt_of(settings, model)

    def entries(self, part: Part) -> list[Entry]:
        """Return the entry of the vectors."""
        return prompt_entries(part)


def prompt_entries(part: Part) -> list[Entry]:
    """Return the entry of vectors that are trained as they are."""
    ((host, prompt),) = deltas_of(part, Prompt).items()
    key, shape = part.key(host, "prompt"), prompt.prompt.shape
    entry = Entry(EMBEDDINGS, key, lambda state: state[key], lambda t: _first_of(t, shape))
    return with_head(part, [entry])


def prompt_of(settings: Settings, model: nn.Module) -> PromptTuning:
    """Return the method that trains on from vectors before the text, however they were made."""
    tokens = read_tokens(settings, model, crossing=(1, 2))
    return PromptTuning(tokens=tokens, init="random", layout="peft")


def before_the_text(part: Part) -> dict[str, Any]:
    """Return the settings that all methods have that put vectors before the text.

    Raises:
        Inexpressible: peft would compute something else.
    """
    enters = list(deltas_of(part, Enter).values())
    virtual = next(iter(deltas_of(part, Virtual).values()))
    if not enters:
        raise Inexpressible("peft puts virtual tokens among words only, and here are none.")
    task_of(part.model)  # which refuses what has no configuration to be asked for more
    heads = text_config(part.model, "num_attention_heads", "n_head", "num_heads")
    width = virtual.vectors().shape[1]
    return common(part, len(enters[0].ids), width, heads, layers_of(part.model))


def check_prompt(part: Part) -> None:
    """Refuse vectors before the text with which peft would compute something else.

    Raises:
        Inexpressible: it would.
    """
    model: Any = part.model
    (enter,) = deltas_of(part, Enter).values()
    if not rehearsable(model):
        if enter.skip:
            raise Inexpressible("peft puts a prompt before the first token, and `layout` is clean.")
        return
    ((host, virtual),) = deltas_of(part, Virtual).items()
    text, tokens = short_text(model), len(enter.ids)
    with rehearsal(model):
        with acting(part, True):
            ours = model(**text)
        prompt = arranged(part, virtual.vectors())
        with acting(part, False):
            theirs = model(**_as_peft(part.host(host), text, prompt))
    require_equal(
        part,
        ours,
        theirs,
        tokens,
        "the prompt stands before the first token there, positions move on and heads may read it; "
        "train with `layout='peft'` what shall go to peft.",
    )


def arranged(part: Part, vectors: Tensor) -> Tensor:
    """Return the virtual tokens' vectors with those of the real words among them, in order."""
    ((host, virtual),) = deltas_of(part, Virtual).items()
    (enter,) = deltas_of(part, Enter).values()
    own = {id_: vectors[i] for i, id_ in enumerate(virtual.ids)}
    table = part.host(host)
    with torch.no_grad(), acting(part, False):
        words = {i: _embedded(table, i, vectors) for i in enter.ids if i not in own}
    return torch.stack([(own | words)[i] for i in enter.ids])


def _first_of(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return as many vectors as peft uses: of those of two parts it uses the first part's.

    Raises:
        AdapterError: there are more, or fewer, or they are wider or narrower.
    """
    tokens, width = shape
    if tensor.dim() != 2 or tensor.shape[1] != width or tensor.shape[0] not in (tokens, 2 * tokens):
        raise AdapterError(
            f"`{EMBEDDINGS}` must have shape {(tokens, width)}, but has {tuple(tensor.shape)} "
            "instead."
        )
    return tensor[:tokens]


def _embedded(table: nn.Module, word: int, like: Tensor) -> Tensor:
    given = table(torch.tensor([word], device=next(table.parameters()).device))
    row: Tensor = (given[0] if isinstance(given, tuple) else given)[0]
    return row.to(like.device, like.dtype)


def _as_peft(table: nn.Module, text: dict[str, Tensor], prompt: Tensor) -> dict[str, Tensor]:
    given = table(text["input_ids"])
    words: Tensor = given[0] if isinstance(given, tuple) else given
    whole = torch.cat([prompt[None].to(words.dtype), words], 1)
    mask = torch.ones(whole.shape[:2], dtype=torch.long, device=whole.device)
    rest = {k: v for k, v in text.items() if k not in ("input_ids", "attention_mask")}
    return {"inputs_embeds": whole, "attention_mask": mask, **rest}


SPELLING = PromptSpelling()
