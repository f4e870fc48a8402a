"""Windows of real tokenizers: where answers begin and end, in tokens and in characters."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lightning_peft.data.windows import (
    IGNORED,
    TokeniseQuestions,
    WindowCollator,
    check_windows,
    label,
)
from lightning_peft.errors import ConfigError
from lightning_peft.models import ModelSource

UNICODE = "🙂 Zoë's café, in İstanbul (伊斯坦布尔), opened\tearly — in 1902."


@pytest.fixture(scope="module")
def bert(minilm_dir):
    return ModelSource(name=str(minilm_dir)).tokenizer()


@pytest.fixture(scope="module")
def byte_level():
    """A tokenizer like Llama's newer ones: bytes, no [CLS], padding on the left."""
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(["where does it open in 1902 the café"] * 5, vocab_size=320)
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, eos_token="</s>", pad_token="</s>", padding_side="left"
    )


@pytest.fixture(params=["bert", "byte_level"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def windows(tokenizer, context, answers=None, question="Where?", max_length=384, stride=16):
    rows = {"question": [question], "context": [context], "answers": [answers]}
    name = "answers" if answers is not None else None
    tokenise = TokeniseQuestions(tokenizer, "question", "context", name, max_length, stride)
    return {key: value[0] for key, value in tokenise(rows).items()}


def answer(context, *texts):
    return {"text": list(texts), "answer_start": [context.index(text) for text in texts]}


@pytest.mark.parametrize(
    "text",
    ["🙂", "Zoë's café", "İstanbul", "伊斯坦布尔", "斯坦布", "opened\tearly", "1902", "1902."],
)
def test_the_labels_are_the_answers_characters(tokenizer, text):
    row = windows(tokenizer, UNICODE, answer(UNICODE, text))
    ((first, last),), (offsets,) = row["labels"], row["offsets"]
    assert text in UNICODE[offsets[first][0] : offsets[last][1]]
    if text != "斯坦布":  # which lies within a token of bytes that are not parted
        assert UNICODE[offsets[first][0] : offsets[last][1]] == text


def test_every_token_of_the_context_stands_where_it_says(tokenizer):
    (offsets,) = windows(tokenizer, UNICODE)["offsets"]
    inside = [(start, end) for start, end in offsets if end > start >= 0]
    assert inside[0][0] == 0
    assert inside[-1][1] == len(UNICODE)
    assert all(UNICODE[a:b] == UNICODE[a:b].strip() for a, b in inside)
    assert set(offsets) - set(inside) <= {(-1, -1)} | {(a, a) for a, _ in offsets}


def test_a_long_context_is_read_whole_and_overlaps(tokenizer):
    words = [f"w{i}" for i in range(100)]
    context = " ".join(words)
    row = windows(tokenizer, context, answer(context, "w50"), max_length=48, stride=16)
    assert len(row["input_ids"]) > 4
    assert all(len(window) <= 48 for window in row["input_ids"])
    seen = {o for offsets in row["offsets"] for o in offsets if o[1] > o[0] >= 0}
    covered = {i for start, end in seen for i in range(start, end)}
    assert covered == {i for i, letter in enumerate(context) if letter != " "}
    found = [
        (context[offsets[first][0] : offsets[last][1]], first)
        for (first, last), offsets, null in zip(
            row["labels"], row["offsets"], row["null"], strict=True
        )
        if first not in (null, IGNORED)
    ]
    assert {text for text, _ in found} == {"w50"}
    null = [one for one, place in zip(row["labels"], row["null"], strict=True) if one[0] == place]
    assert len(null) >= len(row["labels"]) - 3


def test_an_answer_longer_than_a_window_is_left_out_where_it_is_cut(bert):
    context = " ".join(f"w{i}" for i in range(200))
    start = context.index("w50")
    answers = {"text": [context[start : context.index("w150") - 1]], "answer_start": [start]}
    row = windows(bert, context, answers, max_length=64, stride=16)
    labels, null = row["labels"], row["null"][0]
    assert labels[0] == (null, null)
    assert (IGNORED, IGNORED) in labels
    assert set(labels) == {(null, null), (IGNORED, IGNORED)}


def test_the_first_answer_that_stands_whole_counts():
    offsets = [(-1, -1), (0, 2), (3, 5), (6, 8), (-1, -1)]
    assert label(offsets, {"text": ["cc dd", "bb"], "answer_start": [6, 3]}, 0) == (2, 2)
    assert label(offsets, {"text": ["cc dd"], "answer_start": [6]}, 0) == (IGNORED, IGNORED)
    assert label(offsets, {"text": ["ee"], "answer_start": [12]}, 0) == (0, 0)
    assert label(offsets, {"text": [], "answer_start": []}, 4) == (4, 4)
    assert label(offsets, {"text": [" bb "], "answer_start": [2]}, 0) == (2, 2)


def test_a_question_that_fills_the_window_is_cut(tokenizer):
    context = " ".join(f"w{i}" for i in range(30))
    row = windows(
        tokenizer, context, question="why " * 200, max_length=32, stride=16,
        answers=answer(context, "w20"),
    )  # fmt: skip
    assert len(row["input_ids"]) > 1
    assert any(one[0] > row["null"][0] for one in row["labels"])


def test_batches_are_padded_as_the_tokenizer_pads(tokenizer):
    contexts = ["It is in Rome.", "The café opened in 1902, which was long ago, in Rome."]
    rows = [windows(tokenizer, context, answer(context, "Rome")) for context in contexts]
    side = tokenizer.padding_side
    batch = WindowCollator(padding=7, type_padding=0, side=side)(rows)
    width = batch["input_ids"].shape[1]
    for i, context in enumerate(contexts):
        first, last = batch["labels"][i].tolist()
        start, end = batch["row_offsets"][i, first, 0], batch["row_offsets"][i, last, 1]
        assert context[start:end] == "Rome"
        null = batch["row_null"][i]
        assert null == (0 if side == "right" else width - len(rows[i]["input_ids"][0]))
        assert batch["attention_mask"][i].sum() == len(rows[i]["input_ids"][0])
    assert ("token_type_ids" in batch) == ("token_type_ids" in tokenizer.model_input_names)
    padding = batch["attention_mask"] == 0
    assert torch.equal(batch["input_ids"][padding], torch.full_like(batch["input_ids"], 7)[padding])
    assert (batch["row_offsets"][padding] == -1).all()


def test_windows_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="`max_length` must be at least 32, but is 16"):
        check_windows(16, 4)
    with pytest.raises(ConfigError, match=r"`stride` must be between 0 and half .* \(192\), but"):
        check_windows(384, 200)
