import json
import pickle

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value

from lightning_peft.data.entities import IGNORED, EntityData
from lightning_peft.errors import ConfigError, DataError
from lightning_peft.models import ModelSource

ROWS = [
    {"tokens": ["Ada", "Lovelace", "lived", "in", "London"], "labels": "B-per I-per O O B-loc"},
    {"tokens": ["incomprehensibly", "Paris"], "labels": "O B-loc"},
    {"tokens": ["nothing"], "labels": "O"},
]
ROWS = [row | {"labels": row["labels"].split()} for row in ROWS]


@pytest.fixture(scope="module")
def tokenizer(minilm_dir):
    return ModelSource(name=str(minilm_dir)).tokenizer()


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    extra = [{"tokens": ["row", str(i)], "labels": ["O", "O"]} for i in range(8)]
    return {
        "train": write(tmp_path / "train.jsonl", ROWS + extra),
        "test": write(tmp_path / "test.jsonl", ROWS[1:]),
    }


def test_the_first_sub_word_of_each_word_carries_its_tag(files, tokenizer):
    data = EntityData(path=files, batch_size=4).connect(tokenizer)
    data.setup("fit")
    assert data.labels == ("O", "B-loc", "I-loc", "B-per", "I-per")
    batch = next(iter(data.test_dataloader()))
    words = tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    labels = batch["labels"][0].tolist()
    assert labels[0] == labels[-1] == IGNORED
    tagged = [(word, label) for word, label in zip(words, labels, strict=True) if label >= 0]
    assert tagged == [("inc", 0), ("paris", 1)]
    assert batch["row_tags"].tolist() == [[0, 1], [0, IGNORED]]
    assert batch["row_lengths"].tolist() == [2, 1]


def test_training_sentences_that_are_held_out_are_left_out(files, tokenizer):
    data = EntityData(path=files, validation=0.25).connect(tokenizer)
    held = data.inputs("test") + data.inputs("validation")
    assert data.dropped == 2
    assert not any(words in held for words in data.inputs("train"))


def test_a_long_sentence_becomes_pieces_of_one_row(tmp_path, tokenizer):
    words = [f"word{i}" for i in range(40)]
    tags = ["B-x" if i % 7 == 0 else "O" for i in range(40)]
    path = write(tmp_path / "t.jsonl", [{"tokens": words, "labels": tags}] * 2 + ROWS)
    data = EntityData(path={"train": path, "test": path}, max_length=16).connect(tokenizer)
    batch = next(iter(data.test_dataloader()))
    pieces, tokens = batch["input_ids"].shape
    assert tokens <= 16
    assert pieces > 5
    begun = batch["row_words"][batch["row_words"] >= 0]
    width = batch["row_tags"].shape[1]
    expected = [row * width + w for row, n in enumerate([40, 40, 5, 2, 1]) for w in range(n)]
    assert begun.tolist() == expected
    found = batch["labels"][batch["labels"] != IGNORED]
    assert torch.equal(found, batch["row_tags"].flatten()[begun])


@pytest.mark.parametrize(
    ("content", "suffix"),
    [
        ("Ada\tB-per\nLovelace\tI-per\nlived\tO\nin\tO\nLondon\tB-loc\n", "conll"),
        ('tokens,labels\n"Ada Lovelace lived in London","B-per I-per O O B-loc"\n', "csv"),
        (json.dumps(ROWS[0]), "jsonl"),
    ],
)
def test_formats_give_the_same_rows(tmp_path, tokenizer, content, suffix):
    path = tmp_path / f"rows.{suffix}"
    path.write_text(content)
    data = EntityData(path={"test": str(path)}, types=["loc", "per"]).connect(tokenizer)
    assert data.rows("test") == ROWS[:1]


def test_named_numbers_of_a_data_set_become_tags(tmp_path, tokenizer):
    features = Features(
        {
            "tokens": Sequence(Value("string")),
            "ner_tags": Sequence(ClassLabel(names=["O", "B-x", "I-x"])),
        }
    )
    rows = {"tokens": [["a", "b"], ["c"]], "ner_tags": [[1, 2], [0]]}
    path = tmp_path / "rows.parquet"
    Dataset.from_dict(rows, features=features).to_parquet(path)
    data = EntityData(path={"train": str(path), "test": str(path)}, label="ner_tags")
    assert data.connect(tokenizer).targets("test") == [["B-x", "I-x"], ["O"]]


def test_other_schemes_become_bio(tmp_path, tokenizer):
    rows = [{"tokens": ["New", "York", "x"], "labels": ["I-loc", "I-loc", "O"]}]
    path = write(tmp_path / "rows.jsonl", rows)
    settings = {"path": {"test": path}, "types": ["loc"]}
    data = EntityData(**settings, scheme="iob1").connect(tokenizer)
    assert data.targets("test") == [["B-loc", "I-loc", "O"]]
    with pytest.raises(DataError, match=r"word 1 \('New'\) 'I-loc' must follow .*`data.scheme`"):
        EntityData(**settings).connect(tokenizer).setup("test")


@pytest.mark.parametrize("name", ["new.txt", "new.jsonl", "new.conll"])
def test_what_is_predicted_needs_no_tags(tmp_path, tokenizer, name):
    content = {
        "new.txt": "Ada lived\n\nin London",
        "new.jsonl": '{"text": "Ada lived", "id": 1}\n{"text": "in London", "id": 2}',
        "new.conll": "Ada\nlived\n\nin\nLondon\n",
    }
    (tmp_path / name).write_text(content[name])
    data = EntityData(path=str(tmp_path / name)).connect(tokenizer, labels=("O", "B-x", "I-x"))
    assert data.inputs("predict") == [["Ada", "lived"], ["in", "London"]]
    batch = next(iter(data.predict_dataloader()))
    assert not {"labels", "row_tags"} & set(batch)
    assert data.predict_rows()[0]["tokens"] == ["Ada", "lived"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "labels": ["O"]}, "must be 2 tags, one a word, but is 1"),
        ({"tokens": [], "labels": []}, r"must be a list of words, but is \[\]"),
        ({"tokens": ["a", " "], "labels": ["O", "O"]}, "must be a list of words"),
        ({"tokens": ["a"], "labels": ["I-x"]}, r"the tag of word 1 \('a'\) 'I-x' must follow"),
        ({"tokens": ["a"], "labels": ["X-x"]}, "must be O or one of"),
        ({"tokens": ["a"]}, "`labels` must be a list of tags, but is None"),
    ],
)
def test_a_bad_row_is_told_or_left_out(tmp_path, tokenizer, row, message):
    path = write(tmp_path / "rows.jsonl", [*ROWS, row])
    with pytest.raises(DataError, match=f"row 4 of `.*rows.jsonl` cannot be used: .*{message}"):
        EntityData(path={"train": path}).connect(tokenizer).setup("fit")
    data = EntityData(path={"train": path}, skip_bad_rows=True).connect(tokenizer)
    data.setup("fit")
    assert data.skipped["train"] == 1


def test_an_unknown_type_in_a_held_out_file_is_told(files, tmp_path, tokenizer):
    rows = [{"tokens": ["a"], "labels": ["B-lok"]}]
    path = files | {"test": write(tmp_path / "other.jsonl", rows)}
    data = EntityData(path=path).connect(tokenizer)
    with pytest.raises(DataError, match=r"of the types loc, per, but is 'B-lok' \(did you mean"):
        data.setup("test")


def test_rows_without_entities_cannot_be_trained_on(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", ROWS[2:] * 4)
    with pytest.raises(DataError, match="must tag at least one entity"):
        _ = EntityData(path=path).connect(tokenizer).labels


def test_settings_that_the_model_cannot_meet_are_refused(files, tokenizer):
    with pytest.raises(ConfigError, match="`max_length` must be at most 512"):
        EntityData(path=files, max_length=513).connect(tokenizer)
    with pytest.raises(ConfigError, match=r"`connect\(tokenizer\)` must be called"):
        EntityData(path=files).train_dataloader()


def test_it_can_be_pickled_and_loaded_by_workers(files, tokenizer):
    data = EntityData(path=files, num_workers=1, by_length=True).connect(tokenizer)
    data.setup("fit")
    again = pickle.loads(pickle.dumps(data))
    assert again.rows("train") == data.rows("train")
    assert sum(len(batch["row_tags"]) for batch in data.train_dataloader()) == len(
        data.rows("train")
    )


@pytest.mark.parametrize("prefix", [False, True])
def test_words_are_read_as_in_a_text(tmp_path, prefix):
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaTokenizerFast

    bytes_to_words = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    text = "Ada lived in Paris x x"
    bytes_to_words.train_from_iterator([text] * 9, vocab_size=400, special_tokens=special)
    vocab, merges = bytes_to_words.save_model(str(tmp_path))
    tokenizer = RobertaTokenizerFast(vocab=vocab, merges=merges, add_prefix_space=prefix)
    path = tmp_path / "new.txt"
    path.write_text("Ada lived in Paris\n")
    data = EntityData(path=str(path)).connect(tokenizer, labels=("O", "B-x", "I-x"))
    batch = next(iter(data.predict_dataloader()))
    tokens = tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    assert [token for token in tokens if token.startswith("Ġ") and len(token) > 1][-3:] == [
        "Ġlived",
        "Ġin",
        "ĠParis",
    ]
    assert (batch["row_words"] >= 0).sum() == 4
