"""Trainable tokens: both sides keep the new rows themselves, peft in the order of its list."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_peft.delta import plain_name
from lightning_peft.files.peft import names
from lightning_peft.files.peft.settings import Settings
from lightning_peft.files.peft.spelling import (
    BASE,
    Copies,
    Entry,
    Inexpressible,
    Part,
    Spelling,
    require_shape,
)
from lightning_peft.method import Method
from lightning_peft.methods.trainable_tokens import Rows, TrainableTokens


class TrainableTokensSpelling(Spelling):
    """New rows of an embedding table."""

    peft_type = "TRAINABLE_TOKENS"
    kinds = ("trainable_tokens",)
    saves_modules = False

    def config(self, part: Part) -> dict[str, Any]:
        """Return the settings of the method as peft spells them.

        Raises:
            Inexpressible: the whole table is trained.
        """
        ids = cast(TrainableTokens, part.method).token_ids
        if ids is None:
            raise Inexpressible("peft trains a whole table as one of `modules_to_save`.")
        every = names.module_names(part.model)
        return {
            "init_weights": True,
            "target_modules": names.shortest(every, tables(part)),
            "token_indices": list(ids),
        }

    def method(self, settings: Settings, keys: Sequence[str], model: nn.Module) -> Method:
        """Return trainable tokens with the settings."""
        hosts = names.target_hosts(settings, model)
        return tokens(
            settings, "token_indices", settings.any_of("token_indices", list), hosts, model
        )

    def entries(self, part: Part) -> list[Entry]:
        """Return the rows of each table."""
        return rows_of(part, "")


def tokens(
    settings: Settings, name: str, ids: Any, hosts: Sequence[str], model: nn.Module
) -> TrainableTokens:
    """Return the method for ids that a configuration lists under `name`.

    Raises:
        CheckpointError: they are no ids.
    """
    if (
        not isinstance(ids, list)
        or not ids
        or not all(type(i) is int for i in ids)
        or len({*ids}) < len(ids)
    ):
        raise settings.refusal(name, "must list ids, each once")
    return TrainableTokens(token_ids=tuple(ids), targets=names.as_targets(model, hosts))


def tables(part: Part) -> list[str]:
    """Return the names of the tables with trained rows."""
    return [host for host, delta in part.deltas.items() if isinstance(delta, Rows)]


def rows_of(part: Part, inner: str) -> list[Entry]:
    """Return the rows of each table, and their copies in what is tied to it, which peft writes too.

    Args:
        part: the method.
        inner: what peft puts between the name of a table and that of the rows.
    """
    entries = []
    for host in tables(part):
        copies = Copies(_entry(_key(host, inner), part, host))
        tied = [_key(other, inner) for other in _tied(part, host)]
        entries += [copies.entry, *(copies.further(key, optional=True) for key in tied)]
    return entries


def _key(host: str, inner: str) -> str:
    return f"{BASE}{host}.{inner}trainable_tokens_delta"


def _tied(part: Part, host: str) -> list[str]:
    table = part.host(host)._parameters["weight"]
    every = part.model.named_modules(remove_duplicate=False)
    names_of = [n for n, m in every if m._parameters.get("weight") is table]
    return [plain_name(name) for name in names_of if plain_name(name) != host]


def _entry(theirs: str, part: Part, host: str) -> Entry:
    ours = part.key(host, "trainable_tokens")
    shape = cast(Rows, part.deltas[host]).trainable_tokens.shape
    ids = [*(cast(TrainableTokens, part.method).token_ids or ())]
    order = torch.tensor([ids.index(i) for i in sorted(ids)])  # ours are in ascending order

    def read(tensor: Tensor) -> Tensor:
        return require_shape(theirs, tensor, shape)[order]

    return Entry(theirs, ours, lambda state: state[ours][order.argsort()], read)


SPELLING = TrainableTokensSpelling()
