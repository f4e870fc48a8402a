import dataclasses
import json
import pickle

import pytest
import torch

from lightning_peft.data.chat import ChatData
from lightning_peft.data.chat_format import IGNORED, Encoded
from lightning_peft.data.packing import cut, packed
from lightning_peft.errors import ConfigError, DataError
from tests.tiny_chat import chat, tiny_tokenizer, write_rows

LONG = chat("hello", "fine", "how are you", "fine thanks")


def loaded(path, tokenizer=None, **settings):
    data = ChatData(path=path, **settings)
    return data.connect(tokenizer or tiny_tokenizer())


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    rows = [{"messages": chat(f"hello {i}", f"fine {i}")} for i in range(12)]
    test = [{"messages": LONG}, rows[0], {"messages": chat("hello", "yes", "and")}]
    return {
        "train": write_rows(tmp_path / "train.jsonl", rows),
        "test": write_rows(tmp_path / "test.jsonl", test),
    }


@pytest.mark.parametrize(
    "row",
    [
        {"messages": LONG},
        {"conversations": [
            {"from": "human" if t["role"] == "user" else "gpt", "value": t["content"]} for t in LONG
        ]},
    ],
)  # fmt: skip
def test_messages_are_read_however_they_are_written(tmp_path, row):
    data = loaded({"test": write_rows(tmp_path / "t.jsonl", [row])})
    assert data.inputs("test") == [LONG[:3]]
    assert data.targets("test") == ["fine thanks"]


def test_prompts_and_responses_are_conversations(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("prompt,response\nhello,fine\n")
    data = loaded({"test": str(path)}, system="be kind")
    assert data.inputs("test") == [chat("hello", system="be kind")]
    assert data.targets("test") == ["fine"]


def test_parquet_is_read(tmp_path):
    from datasets import Dataset

    Dataset.from_dict({"messages": [LONG]}).to_parquet(tmp_path / "t.parquet")
    assert loaded({"test": str(tmp_path / "t.parquet")}).inputs("test") == [LONG[:3]]


def test_texts_can_be_answered(tmp_path):
    (tmp_path / "new.txt").write_text("hello\nhow are you\n")
    data = loaded(str(tmp_path / "new.txt"))
    batch = next(iter(data.predict_dataloader()))
    texts = data.format.tokenizer.batch_decode(batch["input_ids"])
    assert texts[1] == "<|im_start|>user\nhow are you<|im_end|>\n<|im_start|>assistant\n"
    assert set(batch) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "prompt,response\nhello,\nhow are you,fine\n"),
        ("t.jsonl", '{"prompt": "hello", "response": null}\n{"prompt": "how are you"}\n'),
        (
            "t.json",
            json.dumps([{"messages": chat("hello")}, {"messages": chat("how are you", "")}]),
        ),
    ],
)
def test_what_is_predicted_needs_no_answer(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    data = loaded({"predict": str(tmp_path / name)})
    assert data.inputs("predict") == [chat("hello"), chat("how are you")]
    assert len(next(iter(data.predict_dataloader()))["input_ids"]) == 2
    with pytest.raises(DataError, match=r"row 1 of .* cannot be used"):
        loaded({"test": str(tmp_path / name)}).inputs("test")


def test_a_batch_is_learned_from_or_asks(files):
    data = loaded(files, batch_size=2)
    data.samples = 1
    first, second = data.test_dataloader()
    assert set(first) == set(second) == {"input_ids", "labels", "attention_mask"}
    assert first["input_ids"].shape == first["labels"].shape == first["attention_mask"].shape
    said = first["labels"][first["labels"] != IGNORED]
    assert (said == data.format.tokenizer.eos_token_id).sum() == 3
    collate = dataclasses.replace(data.collator(), asks=True)
    batch = collate([data.test_dataloader().dataset[0]])
    assert batch["row_references"] == ["fine thanks"]
    assert batch["input_ids"].tolist() == [data.format.prompt(LONG[:3], 512)]
    assert batch["attention_mask"].all()


def test_the_last_question_without_an_answer_is_left_out(files):
    data = loaded(files)
    assert data.inputs("test")[2] == chat("hello")
    assert data.targets("test")[2] == "yes"
    ids = data.items("test", data.chosen("test"))["input_ids"][2]
    assert data.format.tokenizer.decode(ids).endswith("yes<|im_end|>")


def test_the_last_question_of_a_new_conversation_is_answered(tmp_path):
    rows = [{"messages": LONG[:3]}, {"messages": LONG}, {"messages": LONG[:1]}]
    data = loaded(write_rows(tmp_path / "new.jsonl", rows))
    assert data.inputs("predict") == [LONG[:3], LONG[:3], LONG[:1]]
    batch = next(iter(data.predict_dataloader()))
    assert len(batch["input_ids"]) == 3
    text = data.format.tokenizer.decode(batch["input_ids"][0])
    assert text.endswith("how are you<|im_end|>\n<|im_start|>assistant\n")


def test_held_out_conversations_are_not_trained_on(files):
    data = loaded(files, held_out=1)
    data.setup("fit")
    assert data.dropped == 1
    assert len(data.inputs("validation")) == len(data.inputs("test")) == 1


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (chat("hello"), "row 2 of .*an assistant's message to learn from, but there is none"),
        (chat("a", "b")[::-1], "message 1 must be of system or user at the start, but is of assis"),
        (chat("a", "b") + chat("c", "d")[1:], "message 3 must be of user after assistant"),
        (chat("a", "b") + chat(system="x"), "message 3 must be of user after assistant, but is of"),
        (chat("a", "   "), "message 2 must have a text as content, but is empty"),
        ([{"role": "usr", "content": "a"}], "but is of 'usr' Did you mean `user`"),
        ([{"role": "user", "text": "a"}], "message 1 must have a text as content, but has None"),
        ([], "`messages` must be a list of messages, but is"),
        ("hello", "`messages` is a text in row 2 and a list in most others"),
        ([{"role": "user", "content": 5}], r"`messages\[\].content` is a number in row 2"),
        (["hello"], r"`messages\[\]` is a text in row 2"),
    ],
)  # fmt: skip
def test_bad_conversations_are_named_or_left_out(tmp_path, messages, message):
    rows = [{"messages": LONG}, {"messages": messages}, {"messages": chat("x", "y")}]
    path = write_rows(tmp_path / "bad.jsonl", rows)
    with pytest.raises(DataError, match=message) as error:
        loaded({"test": path}).setup("test")
    assert "bad.jsonl" in str(error.value)
    data = loaded({"test": path}, skip_bad_rows=True)
    assert data.targets("test") == ["fine thanks", "y"]
    assert data.skipped["test"] == 1


@pytest.mark.parametrize("message", [{"role": "user"}, {"role": None}, {"content": "a"}, {}, "a"])
def test_a_message_of_a_file_without_a_key_is_told(tmp_path, message):
    path = write_rows(tmp_path / "bad.jsonl", [{"messages": [message]}])
    with pytest.raises(DataError, match=r"row 1 of .* cannot be used: message 1 must "):
        loaded({"test": path}).setup("test")


def test_a_missing_column_names_what_there_is(tmp_path):
    path = write_rows(tmp_path / "t.jsonl", [{"mesages": LONG}])
    with pytest.raises(DataError, match=r"`messages` must be a column .* Did you mean `mesages`"):
        loaded({"test": path}).setup("test")
    path = write_rows(tmp_path / "u.jsonl", [{"prompt": "a", "respons": "b"}])
    with pytest.raises(DataError, match=r"`response` must be a column .* Did you mean `respons`"):
        loaded({"test": path}).setup("test")


def test_a_length_that_holds_nothing_and_a_missing_template_are_refused():
    with pytest.raises(ConfigError, match="`max_length` must be at least 8, but is 2"):
        ChatData(path="x.jsonl", max_length=2)
    with pytest.raises(ConfigError, match="`chat_template` must be a file"):
        ChatData(path="x.jsonl", chat_template="none.jinja").connect(tiny_tokenizer())


def encoded(*parts: tuple[str, int]) -> Encoded:
    """Tokens numbered from 0; `a` is what the assistant says."""
    said = [who == "a" for who, count in parts for _ in range(count)]
    return Encoded(list(range(len(said))), [i if a else IGNORED for i, a in enumerate(said)])


@pytest.mark.parametrize(
    ("whole", "first", "last"),
    [
        (encoded(("u", 3), ("a", 3), ("u", 2), ("a", 2)), 0, 10),  # all fits
        (encoded(("u", 3), ("a", 3), ("u", 2), ("a", 5)), 0, 6),  # whole turns
        (encoded(("u", 3), ("a", 3), ("u", 20)), 0, 6),
        (encoded(("u", 4), ("a", 30)), 0, 10),  # as much as fits
        (encoded(("u", 30), ("a", 2)), 22, 32),  # the end of the question
        (encoded(("u", 30), ("a", 30)), 25, 35),  # half each
    ],
)
def test_a_cut_keeps_whole_turns_or_a_part_of_the_first_answer(whole, first, last):
    short = cut(whole, 10)
    assert short.ids == list(range(first, last))
    assert any(label != IGNORED for label in short.labels)


def test_packing_fills_rows_and_loses_nothing():
    lengths = [7, 3, 5, 2, 8, 1, 4]
    rows = packed(lengths, 10)
    assert sorted(i for row in rows for i in row) == list(range(7))
    assert all(sum(lengths[i] for i in row) <= 10 for row in rows)
    assert len(rows) == 3


def test_packed_rows_begin_anew_with_each_conversation(files):
    data = loaded(files, pack=True, max_length=64, batch_size=2)
    apart = loaded(files, max_length=64)
    whole = [apart.items("train", apart.chosen("train")), data.items("train", data.chosen("train"))]
    assert len(whole[1]) < len(whole[0])
    tokens = [sorted(i for row in rows["input_ids"] for i in row) for rows in whole]
    assert tokens[0] == tokens[1]
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert (batch["labels"][batch["position_ids"] == 0] == IGNORED).all()
    padding = batch["input_ids"] == data.format.tokenizer.pad_token_id
    assert (batch["labels"][padding] == IGNORED).all()
    assert (batch["position_ids"] == 0).sum() > len(batch["input_ids"])


def test_batches_can_be_made_in_other_processes(files):
    data = loaded(files, by_length=True)
    assert next(iter(data.train_dataloader()))["labels"].dtype == torch.long
    pickle.loads(pickle.dumps(data.collator()))
