"""Trainable tokens: train the embeddings of a few tokens, and nothing else of the vocabulary.

    E'[i] = t_i for each chosen id i,    E'[i] = E[i] for all others,    t_i ∈ R^(d_model)

As in peft (https://huggingface.co/docs/peft/package_reference/trainable_tokens). What is trained is
the new row itself, not its difference from the old one, so that it does not matter which random row
an added token began with. An output head that is tied to the table speaks with the new rows too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.delta import Delta
from lightning_peft.deltas.passing import first_input
from lightning_peft.deltas.sites import Table, site_of
from lightning_peft.deltas.weight_delta import DerivedDelta, own, shared, trained
from lightning_peft.errors import AdapterError, ConfigError, TargetError
from lightning_peft.method import Method
from lightning_peft.structure.anatomy import base_modules, embeddings, is_linear, is_transformers
from lightning_peft.structure.targets import Patterns, Targets, as_targets


@dataclass(frozen=True, kw_only=True)
class TrainableTokens(Method):
    """Train chosen rows of the word embedding.

    Raises:
        ConfigError: an id is negative or named twice, or there is none.
    """

    kind: ClassVar[str] = "trainable_tokens"

    token_ids: Sequence[int] | None = None
    """Ids of the tokens to train; None trains the whole table in place."""

    targets: Targets | Patterns | None = None
    """Which embedding tables: None (the word embedding) or patterns."""

    def __post_init__(self) -> None:
        ids = self.token_ids
        if ids is not None and (not ids or len({*ids}) < len(ids) or min(ids) < 0):
            raise ConfigError(
                f"`token_ids` must be different ids from 0 on, or None, but is {[*ids]} instead."
            )

    def deltas(self, model: nn.Module) -> dict[str, Delta]:
        """Return the delta of each table, and of what is tied to it."""
        found: dict[str, Delta] = {}
        for name, table in self._tables(model).items() if self.token_ids is not None else ():
            if name in found:
                continue
            found[name] = rows = Rows(table, self._checked(table))
            tied = {n: m for n, m in base_modules(model) if _shares(m, table) and n != name}
            found |= {n: TiedRows(rows) for n in tied}
        return found

    def in_place(self, model: nn.Module) -> list[str]:
        """Return the tables, if all their rows are to be trained."""
        if self.token_ids is not None:
            return []
        wanted = {id(table.weight) for table in self._tables(model).values()}
        return [name for name, p in model.named_parameters() if id(p) in wanted]

    def _tables(self, model: nn.Module) -> Mapping[str, nn.Embedding]:
        if self.targets is not None:
            found: Any = as_targets(self.targets, None).find(model, _is_table, "Embedding")
            return found
        return _word_embedding(model)

    def _checked(self, table: nn.Embedding) -> tuple[int, ...]:
        ids = tuple(sorted(self.token_ids or ()))
        if ids[-1] >= table.num_embeddings:
            raise ConfigError(
                f"`token_ids` must lie in [0, {table.num_embeddings}), the rows of the table, but "
                f"{ids[-1]} does not: resize the model's embeddings for new tokens first."
            )
        return ids


class Rows(DerivedDelta):
    """New rows of one table.

    Shapes: `trainable_tokens` `(chosen, d_model)`; `ids` `(chosen,)`, ascending.
    """

    constants = ("ids",)
    ids: Tensor
    additive = False
    merges_shared = True

    def __init__(self, table: nn.Embedding, chosen: tuple[int, ...]) -> None:
        super().__init__(site_of(table), table.weight)
        if table.weight.is_meta:
            raise AdapterError(
                "The rows of trainable tokens start as those of the table, which has no values on "
                "the meta device: fill the model first, then inject."
            )
        self.chosen = chosen
        self.trainable_tokens = trained(table.weight, len(chosen), table.embedding_dim)
        self.settle()
        with torch.no_grad():
            self.trainable_tokens.copy_(table.weight[self.ids])

    def derive(self, device: torch.device) -> Mapping[str, Tensor]:
        """Return the ids."""
        return {"ids": shared(_ids, self.chosen, device=device)}

    def difference(self, weight: Tensor) -> Tensor:
        """Return new rows less old ones, `(chosen, d_model)`."""
        return self.trainable_tokens - weight[self.ids]

    def forward(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Return the vectors, those of the chosen tokens replaced."""
        ids = first_input(args, kwargs)
        place = torch.searchsorted(self.ids, ids).clamp_max(len(self.ids) - 1)
        added = F.embedding(place, self.difference(own(host, "weight")))
        added = added * (self.ids[place] == ids).unsqueeze(-1)
        scale = self.site.output_scale if isinstance(self.site, Table) else 1.0
        return output + (added * scale).to(output.dtype)

    def change(self, weight: Tensor) -> Tensor:
        """Return the change of the table, `(d_model, vocabulary)`."""
        difference = self.difference(weight.T).T
        whole = difference.new_zeros(weight.shape)
        return whole.index_copy(1, self.ids, difference)


class TiedRows(Delta):
    """The new rows of a table, in a module that shares its weight."""

    merges_shared = True

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        # Not as a child: the rows belong to the table's delta, and are listed and stored there.
        self.__dict__["rows"] = rows

    def forward(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Return the vectors, or the logits, as the new rows give them."""
        rows: Rows = self.__dict__["rows"]
        if isinstance(host, nn.Embedding):
            return rows(host, args, kwargs, output)
        x = first_input(args, kwargs)
        added = F.linear(x, rows.difference(own(host, "weight")).to(x.dtype))
        # In place: a copy of the logits can be the largest tensor of all.
        add = output.index_add_ if self.strength == 1 else output.index_add
        return add(-1, rows.ids, added.to(output.dtype))

    def merge(self, module: nn.Module) -> None:
        """Leave the weight to the table's delta."""


def _word_embedding(model: nn.Module) -> dict[str, nn.Embedding]:
    """Return the table of token embeddings; a model of several codebooks has one for each."""
    known = [module for _, module in base_modules(model) if is_transformers(module)]
    try:
        given: Any = known[0].get_input_embeddings() if known else None  # type: ignore[operator]
    except NotImplementedError:
        given = None
    named = embeddings(model)
    if given is None:
        found = dict(named[:1])
    else:
        own_tables = [given, *(given if isinstance(given, nn.ModuleList) else ())]
        found = {name: table for name, table in named if any(table is t for t in own_tables)}
    if not found:
        raise TargetError(
            f"{type(model).__name__} has no table of token embeddings, so there is no token to "
            "train."
        )
    return found


def _is_table(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding)


def _shares(module: nn.Module, table: nn.Embedding) -> bool:
    return module._parameters.get("weight") is table.weight and (
        _is_table(module) or is_linear(module)
    )


def _ids(chosen: tuple[int, ...]) -> Tensor:
    return torch.tensor(chosen, device="cpu")
