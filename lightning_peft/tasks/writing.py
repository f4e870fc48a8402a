"""Texts that models write, for the tasks that ask for them: asked, written, and scored."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft.baseline import Baseline, untouched_baseline
from lightning_peft.delta import SLOT, Delta, slot_of
from lightning_peft.deltas.mixed import Mixture
from lightning_peft.deltas.virtual_tokens import Enter
from lightning_peft.errors import ConfigError, TargetError
from lightning_peft.structure.cores import core_of, room_of
from lightning_peft.tasks.task import Task


@torch.no_grad()
def written(
    model: Any,
    given: Mapping[str, Tensor],
    *,
    max_new_tokens: int,
    end: int | Sequence[int] | None,
    padding: int,
    beams: int = 1,
) -> list[list[int]]:
    """Return the tokens that a model of transformers writes for each row, by a search for the best.

    Args:
        model: Causal, or an encoder-decoder.
        given: `input_ids` and `attention_mask`, both `(rows, tokens)`; those of a causal model are
            padded on the left.
        max_new_tokens: Tokens of a text at most.
        end: What ends a text.
        padding: Fills rows up that ended before others.
        beams: Width of the search; 1 takes the likeliest token each time.

    Raises:
        ConfigError: The model has too few positions for what it reads and writes.
    """
    from transformers import GenerationConfig

    length = given["input_ids"].shape[1]
    check_room(model, length, max_new_tokens)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=beams,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=padding,
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
    )
    found: Tensor = model.generate(**given, generation_config=settings)
    begin = 1 if model.config.is_encoder_decoder else length
    rows: list[list[int]] = found[:, begin:].tolist()
    return rows


def check_room(model: nn.Module, length: int, new: int) -> None:
    """Compare the tokens that a model reads and writes with the learned positions that it has.

    Args:
        model: With its adapters, whose virtual tokens count.
        length: How many tokens it reads.
        new: How many it writes at most.

    Raises:
        ConfigError: They are more.
    """
    try:
        core, decoder = core_of(model)
    except TargetError:  # nobody knows where it reads
        return
    read = length + virtual_tokens(core.module)
    room = room_of(core, 0)
    if room is not None and read > room:
        raise ConfigError(
            f"the data must cut texts at {room - read + length} tokens, for which the model has "
            f"positions beside virtual tokens, but one has {length}: lower its maximal length."
        )
    before = read if decoder is None else 1
    room = room_of(decoder or core, 0)
    if room is not None and before + new - 1 > room:  # the last one written is not read again
        raise ConfigError(
            f"`max_new_tokens` must be at most {room - before + 1} behind {before} tokens, virtual "
            f"ones counted, since the model has {room} positions, but is {new} instead: lower it, "
            f"or let the data cut texts shorter."
        )


def virtual_tokens(core: nn.Module) -> int:
    """Return how many virtual tokens enter a core at most, in any row."""
    running = slot_of(core).running if SLOT in core._modules else []
    chains: list[list[Delta]] = [running]
    chains += [[*c] for d in running if isinstance(d, Mixture) for c in d.changes.values()]
    return max(sum(len(d.ids) for d in chain if isinstance(d, Enter)) for chain in chains)


def asking(loader: DataLoader[Any], numbers: Sequence[int]) -> DataLoader[Any]:
    """Return batches of some rows of a loader that a model is to answer by itself."""
    rows: Any = loader.dataset
    collate: Any = loader.collate_fn
    asks = dataclasses.replace(collate, asks=True)
    return DataLoader(rows.select(numbers), batch_size=loader.batch_size, collate_fn=asks)


def written_baseline(
    model: nn.Module,
    task: Task,
    validation: DataLoader[Any],
    test: DataLoader[Any] | None = None,
) -> Baseline:
    """Measure the base as it came, with the scores of what it writes."""
    found = untouched_baseline(model, task, validation, test)
    own = dict(found.validation) | _scores(model, task, validation)
    held_out = dict(found.test) | (_scores(model, task, test) if test is not None else {})
    return dataclasses.replace(found, validation=own, test=held_out)


def _scores(model: nn.Module, task: Task, loader: DataLoader[Any]) -> dict[str, float]:
    targets: list[Any] = []
    predictions: list[dict[str, Any]] = []
    device = next(model.parameters()).device
    for batch in task.asked(loader)[0]:
        targets += batch["row_references"]
        predictions += task.predictions(model, move_data_to_device(batch, device))
    return task.scores(targets, predictions)
