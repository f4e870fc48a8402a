"""Conversations as batches of tokens, of which a model learns what the assistant says."""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_peft.data.bad_rows import SKIP
from lightning_peft.data.chat_format import IGNORED, ChatFormat, Encoded
from lightning_peft.data.choices import Choice, Loading
from lightning_peft.data.conversations import Turn, asked, fault, turns_of, unanswered
from lightning_peft.data.origin import Origin
from lightning_peft.data.packing import cut, packed
from lightning_peft.data.rows import RowData
from lightning_peft.data.splits import normalised
from lightning_peft.data.texts import check_max_length, tokenised
from lightning_peft.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_SHAREGPT = "conversations"
_TEXT = "text"
_LEAST = 8  # tokens of a row


class ChatData(RowData):
    """Conversations, or pairs of a prompt and a response.

    A row has a list of messages with `role` and `content` (or `from` and `value`, as in ShareGPT)
    in a column `messages` or `conversations`; or a prompt and a response in two columns. To predict
    there may be texts alone, in a column `text`.

    Batches are dictionaries of tensors: `input_ids`, `labels` (the same numbers where the assistant
    speaks, else -100) and `attention_mask`, or `position_ids` where conversations share a row, all
    `(rows, tokens)`. A batch to be answered has `input_ids` and `attention_mask` alone, padded on
    the left, and `row_references`, the texts that are right, where they are known.

    Args:
        path: One file, for `predict` the one to answer and else the one to train on; or files by
            split: train, validation, test, predict. JSON lines, Parquet, CSV or TSV.
        hub: Name of a data set on the hub.
        hub_config: Its configuration, where it has several.
        source: Conversations that a package carries: chitchat.
        format: Format of the files (jsonl, parquet, csv, tsv, txt); None takes it from each name.
        messages: Column of the messages.
        prompt: Column of what the user asks, where there are no messages.
        response: Column of what the assistant answers.
        system: What the system says where a conversation does not begin with it.
        chat_template: File with a Jinja template to use instead of the tokenizer's.
        validation: Share of the training rows to hold out where there is no validation split.
        test: Share of the training rows to hold out where there is no test split; None draws none.
        seed: Seed of these draws and of `limit`.
        batch_size: Rows in a batch.
        max_length: Tokens of a row.
        pack: Let short conversations share a training row, each attending to itself alone.
        limit: At most so many rows of each split, drawn by seed; for trials.
        held_out: At most so many rows of validation and of test.
        skip_bad_rows: Leave rows out that cannot be used, and count them.
        by_length: Train on batches of like lengths, which have little padding.
        num_workers: Processes that load batches.

    Raises:
        ConfigError: A number is out of its range.
    """

    def __init__(
        self,
        *,
        path: str | Mapping[str, str] | None = None,
        hub: str | None = None,
        hub_config: str | None = None,
        source: str | None = None,
        format: str | None = None,  # noqa: A002  # the word that users know
        messages: str = "messages",
        prompt: str = "prompt",
        response: str = "response",
        system: str | None = None,
        chat_template: str | None = None,
        validation: float = 0.1,
        test: float | None = None,
        seed: int = 0,
        batch_size: int = 8,
        max_length: int = 512,
        pack: bool = False,
        limit: int | None = None,
        held_out: int | None = None,
        skip_bad_rows: bool = False,
        by_length: bool = False,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            Origin(path=path, hub=hub, hub_config=hub_config, source=source, format=format),
            Choice(
                validation=validation,
                test=test,
                seed=seed,
                limit=limit,
                held_out=held_out,
                skip_bad_rows=skip_bad_rows,
            ),
            Loading(batch_size=batch_size, num_workers=num_workers, by_length=by_length),
        )
        if max_length < _LEAST:
            raise ConfigError(
                f"`max_length` must be at least {_LEAST}, but is {max_length} instead."
            )
        self.messages, self.prompt, self.response = messages, prompt, response
        self.system, self.chat_template = system, chat_template
        self.max_length, self.pack = max_length, pack
        self.samples = 0
        """So many rows of the validation and of the test split can be asked, the first ones."""
        self._format: ChatFormat | None = None

    def connect(
        self, processor: "PreTrainedTokenizerBase", labels: Sequence[str] | None = None
    ) -> Self:
        """Take the model's tokenizer, with its chat template.

        Raises:
            ConfigError: `max_length` is more than the model can read, or the tokenizer cannot tell
                where a token stands.
        """
        check_max_length(self.max_length, processor)
        self._format = ChatFormat(processor, _template(self.chat_template))
        self._items.clear()
        return self

    @property
    def format(self) -> ChatFormat:
        """The tokenizer and its chat template.

        Raises:
            ConfigError: There is none yet.
        """
        if self._format is None:
            raise ConfigError("`connect(tokenizer)` must be called before batches can be made.")
        return self._format

    def columns(self, split: str, rows: "Dataset") -> dict[str, str | None]:
        texts = split == "predict" and _TEXT in rows.column_names
        if self._column(rows) is not None or texts:
            return {}
        if self.prompt in rows.column_names:
            return {"response": None if split == "predict" else self.response}
        return {"messages": self.messages}

    def problems(self, split: str, rows: "Dataset", number: Callable[[int], int]) -> dict[int, str]:
        wrong = (fault(turns, split != "predict") for turns in self._turns(rows, split))
        origin = self.origin.name(split)
        return {
            i: f"row {number(i):,} of {origin} cannot be used: {reason}; or {SKIP}."
            for i, reason in enumerate(wrong)
            if reason
        }

    def keys(self, rows: "Dataset") -> list[Hashable]:
        return [tuple(normalised(turn["content"]) for turn in turns) for turns in self._turns(rows)]

    def strata(self, split: str, rows: "Dataset") -> list[int]:
        return [0] * len(rows)

    def items(self, split: str, rows: "Dataset") -> "Dataset":
        from datasets import Dataset, concatenate_datasets

        conversations = self._turns(rows, split)
        if split == "predict":
            prompts = [self._prompt(asked(turns, answered=False)) for turns in conversations]
            return Dataset.from_dict({"prompt": prompts})
        encode = EncodeChats(self.format, self.max_length)
        encoded = tokenised(Dataset.from_dict({"turns": conversations}), encode)
        self._tell_cut(split, sum(encoded["cut"]), len(encoded))
        encoded = encoded.remove_columns("cut")
        if split == "train":
            return _shared(encoded, self.max_length) if self.pack else encoded
        unasked = [None] * max(len(rows) - self.samples, 0)
        first = conversations[: self.samples]
        prompts = [self._prompt(asked(turns, answered=True)) for turns in first]
        given = {
            "prompt": [*prompts, *unasked],
            "reference": [*map(_answer, first), *unasked],
        }
        return concatenate_datasets([encoded, Dataset.from_dict(given)], axis=1)

    def collator(self) -> "ChatCollator":
        return ChatCollator(int(self.format.tokenizer.pad_token_id or 0))

    def inputs(self, split: str) -> list[list[Turn]]:
        turns = self._turns(self.chosen(split), split)
        return [asked(one, answered=split != "predict") for one in turns]

    def targets(self, split: str) -> list[str]:
        return list(map(_answer, self._turns(self.chosen(split))))

    def _column(self, rows: "Dataset") -> str | None:
        wanted = (self.messages, _SHAREGPT)
        return next((column for column in wanted if column in rows.column_names), None)

    def _turns(self, rows: "Dataset", split: str = "train") -> list[Any]:
        """Return the conversation of each row; something else where it is none."""
        column = self._column(rows)
        found = self._pairs(rows) if column is None else map(turns_of, rows[column])
        begun = [self._begun(turns) for turns in found]
        return list(map(unanswered, begun)) if split == "predict" else begun

    def _pairs(self, rows: "Dataset") -> list[Any]:
        column = self.prompt if self.prompt in rows.column_names else _TEXT
        has_answers = self.response in rows.column_names
        answers = rows[self.response] if has_answers else [None] * len(rows)
        return [
            [{"role": "user", "content": prompt}]
            + ([{"role": "assistant", "content": answer}] if has_answers else [])
            for prompt, answer in zip(rows[column], answers, strict=True)
        ]

    def _begun(self, turns: Any) -> Any:
        """Put the system's message first where there is none."""
        begins = isinstance(turns, list) and turns and isinstance(turns[0], dict)
        if self.system is None or not begins or turns[0].get("role") == "system":
            return turns
        return [{"role": "system", "content": self.system}, *turns]

    def _prompt(self, turns: Sequence[Turn]) -> list[int]:
        return self.format.prompt(turns, self.max_length)

    def _tell_cut(self, split: str, cut: int, rows: int) -> None:
        if cut:
            rank_zero_info(
                f"Cut {cut:,} of {rows:,} conversations of {self.origin.name(split)} at "
                f"{self.max_length} tokens."
            )


@dataclasses.dataclass(frozen=True)
class EncodeChats:
    """Turns conversations into tokens and labels, cut at `max_length`."""

    format: ChatFormat
    max_length: int

    def __call__(self, rows: Mapping[str, list[Any]]) -> dict[str, Any]:
        whole = [self.format.encode(turns, self.max_length) for turns in rows["turns"]]
        fitting = [cut(one, self.max_length) for one in whole]
        return {
            "input_ids": [one.ids for one in fitting],
            "labels": [one.labels for one in fitting],
            "cut": [len(one.ids) > self.max_length for one in whole],
        }


@dataclasses.dataclass(frozen=True)
class ChatCollator:
    """Makes a batch of items: to learn from, or where there are no labels to be answered."""

    padding: int
    asks: bool = False
    """Leave out what the assistant says at last, so that the model answers by itself."""

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        answered = "labels" in items[0] and not self.asks
        return self._conversations(items) if answered else self._prompts(items)

    def _conversations(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        ids = [torch.tensor(item["input_ids"]) for item in items]
        batch = {
            "input_ids": pad_sequence(ids, True, self.padding),
            "labels": pad_sequence([torch.tensor(i["labels"]) for i in items], True, IGNORED),
        }
        if "positions" not in items[0]:
            mask = pad_sequence([torch.ones_like(one) for one in ids], True, 0)
            return batch | {"attention_mask": mask}
        # What pads a row is a conversation by itself: it begins at 0 again, and has no labels.
        width = batch["input_ids"].shape[1]
        positions = [i["positions"] + list(range(width - len(i["positions"]))) for i in items]
        return batch | {"position_ids": torch.tensor(positions)}

    def _prompts(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        ids = [torch.tensor(item["prompt"]) for item in items]
        masks = [torch.ones_like(one) for one in ids]
        batch: dict[str, Any] = {
            "input_ids": pad_sequence(ids, True, self.padding, padding_side="left"),
            "attention_mask": pad_sequence(masks, True, 0, padding_side="left"),
        }
        if "reference" in items[0]:
            batch["row_references"] = [item["reference"] for item in items]
        return batch


def _shared(encoded: "Dataset", room: int) -> "Dataset":
    """Return rows of several conversations; positions begin anew with each."""
    from datasets import Dataset

    whole = [Encoded(row["input_ids"], row["labels"]) for row in encoded.to_list()]
    rows = [[whole[i] for i in row] for row in packed([len(one.ids) for one in whole], room)]
    return Dataset.from_dict(
        {
            "input_ids": [[i for one in row for i in one.ids] for row in rows],
            # The first token of one must not be predicted from the last of another.
            "labels": [[i for one in row for i in (IGNORED, *one.labels[1:])] for row in rows],
            "positions": [[i for one in row for i in range(len(one.ids))] for row in rows],
        }
    )


def _answer(turns: Sequence[Turn]) -> str:
    """Return what the assistant says at last; empty where it says nothing."""
    said = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    return said[-1] if said else ""


def _template(file: str | None) -> str | None:
    if file is None:
        return None
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"`chat_template` must be a file with a Jinja template, but {file!r} cannot be read: "
            f"{error.strerror}."
        ) from error
