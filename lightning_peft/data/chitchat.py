"""Small talk between two people: the Chit-Chat data set (BYU PCC lab, MIT), from a package.

7,168 conversations, of which those are kept in which both sides speak. Who begins is the user, the
other the assistant, whose part a model learns.
"""

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_peft.data.conversations import Turn
from lightning_peft.data.packaged import package_file

if TYPE_CHECKING:
    from datasets import Dataset

REQUIREMENT = "chitchat-dataset==0.9.0"
_SHA256 = "d2a5d0bf6acf354fef51f3af39cbece2220d3b8f6086b658c3d335105798312a"
_SIDES = ("user", "assistant")
_SPLITS = ("test", "validation", *["train"] * 8)  # by turns


@functools.cache
def read_chitchat() -> dict[str, "Dataset"]:
    """Return the splits train, validation and test (8 to 1 to 1): one column, messages.

    Raises:
        DataError: The package is not installed.
        ConfigError: Its file has another digest.
    """
    from datasets import Dataset

    path = package_file("chitchat_dataset", "dataset.json", REQUIREMENT, _SHA256)
    found = map(_turns, json.loads(path.read_text(encoding="utf-8")).values())
    spoken = [turns for turns in found if len(turns) > 1]
    by_split: dict[str, list[list[Turn]]] = {split: [] for split in reversed(_SPLITS)}
    for split, turns in zip(itertools.cycle(_SPLITS), spoken, strict=False):
        by_split[split].append(turns)
    return {split: Dataset.from_dict({"messages": rows}) for split, rows in by_split.items()}


def _turns(conversation: Mapping[str, Any]) -> list[Turn]:
    """Return a conversation in which what one says in a row is one message, a line each."""
    said = [one for run in conversation["messages"] for one in run if one["text"].strip()]
    runs = [list(run) for _, run in itertools.groupby(said, key=lambda one: one["sender"])]
    return [
        {"role": _SIDES[i % 2], "content": "\n".join(_texts(run))} for i, run in enumerate(runs)
    ]


def _texts(run: Sequence[Mapping[str, Any]]) -> list[str]:
    return [one["text"].strip() for one in run]
