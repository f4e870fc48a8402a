import json
import pickle
from pathlib import Path

import pytest
from datasets import Dataset

from lightning_peft.data.question_answering import QuestionData, misplaced
from lightning_peft.errors import ConfigError, DataError
from lightning_peft.models import ModelSource

XQUAD = Path(__file__).parents[3] / "shared" / "data" / "xquad"


@pytest.fixture(scope="module")
def tokenizer(minilm_dir):
    return ModelSource(name=str(minilm_dir)).tokenizer()


def row(number, title=None, context=None, **more):
    context = context or f"Number {number} stands in drawer {number * 7}."
    text = context.split()[-1].strip(".")
    answers = {"text": [text], "answer_start": [context.index(text)]}
    found = {"id": str(number), "question": f"Where is {number}?", "context": context}
    return found | {"answers": answers} | ({"title": title} if title else {}) | more


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def path(tmp_path) -> str:
    return write(tmp_path / "rows.jsonl", [row(i, title=f"book {i // 5}") for i in range(100)])


def test_drawn_splits_keep_documents_whole(path, tokenizer):
    data = QuestionData(path=path, validation=0.2, test=0.3).connect(tokenizer)
    titles = {s: {row["title"] for row in data.rows(s)} for s in ("train", "validation", "test")}
    assert [len(found) for found in titles.values()] == [10, 4, 6]
    assert len(set.union(*titles.values())) == 20
    again = QuestionData(path=path, validation=0.2, test=0.3).connect(tokenizer)
    assert again.rows("test") == data.rows("test")
    other = QuestionData(path=path, validation=0.2, test=0.3, seed=1).connect(tokenizer)
    assert other.rows("test") != data.rows("test")


def test_without_titles_no_paragraph_stands_in_two_splits(tmp_path, tokenizer):
    rows = [row(i, context=f"Drawer  {i // 4} holds it.", question=f"What {i}?") for i in range(40)]
    data = QuestionData(path=write(tmp_path / "r.jsonl", rows), validation=0.2, test=0.2)
    contexts = [
        {row["context"] for row in data.connect(tokenizer).rows(split)}
        for split in ("train", "validation", "test")
    ]
    assert [len(found) for found in contexts] == [6, 2, 2]
    assert len(set.union(*contexts)) == 10


def test_a_test_file_is_not_drawn_again(path, tmp_path, tokenizer):
    other = write(tmp_path / "test.jsonl", [row(i) for i in (1, 200, 201)])
    data = QuestionData(path={"train": path, "test": other}, test=0.3).connect(tokenizer)
    assert [row["id"] for row in data.rows("test")] == ["1", "200", "201"]
    assert len(data.rows("train")) + len(data.rows("validation")) == 99
    assert data.dropped == 1
    alone = QuestionData(path={"test": other}, test=0.3).connect(tokenizer)
    assert len(alone.rows("test")) == 3
    assert not QuestionData(path=path).connect(tokenizer).has_split("test")


@pytest.mark.skipif(not XQUAD.is_dir(), reason="XQuAD is not beside the checkout")
@pytest.mark.parametrize("language", ["en", "zh"])
def test_xquad_has_the_same_articles_held_out_in_each_language(tokenizer, language):
    path = str(XQUAD / "xquad.{language}.json")
    data = QuestionData(path=path, language=language, validation=0.15, test=0.2)
    data.connect(tokenizer)
    splits = {s: data.rows(s) for s in ("train", "validation", "test")}
    assert {s: len(rows) for s, rows in splits.items()} == {
        "train": 765, "validation": 190, "test": 235,
    }  # fmt: skip
    assert {"Black_Death", "Chloroplast"} < {row["title"] for row in splits["test"]}
    batch = next(iter(data.val_dataloader()))
    found = set()
    for number, offsets, (first, last), null in zip(
        batch["row_numbers"].tolist(), batch["row_offsets"], batch["labels"].tolist(),
        batch["row_null"].tolist(), strict=True,
    ):  # fmt: skip
        if first not in (-100, null):
            text = batch["row_contexts"][number][offsets[first, 0] : offsets[last, 1]]
            assert text in batch["row_answers"][number]
            found.add(number)
    assert len(found) == 16


def test_a_batch_has_all_windows_of_its_questions(tmp_path, tokenizer):
    long = " ".join(f"word{i}" for i in range(80)) + " end."
    rows = [row(0), row(1, context=long), row(2)]
    data = QuestionData(
        path={"train": write(tmp_path / "r.jsonl", rows), "test": str(tmp_path / "r.jsonl")},
        max_length=64, stride=16, by_length=True, num_workers=1,
    ).connect(tokenizer)  # fmt: skip
    batch = next(iter(data.test_dataloader()))
    numbers = batch["row_numbers"].tolist()
    assert numbers == sorted(numbers)
    assert numbers.count(1) > 3
    assert batch["row_answers"] == [["0"], ["end"], ["14"]]
    assert pickle.loads(pickle.dumps(data)).rows("test") == rows


def test_what_is_predicted_needs_no_answers(tmp_path, tokenizer):
    new = [{"question": "Who?", "context": "Ada did.", "note": "x"}]
    data = QuestionData(path=write(tmp_path / "new.jsonl", new)).connect(tokenizer)
    assert data.predict_rows() == new
    assert data.inputs("predict") == [{"question": "Who?", "context": "Ada did."}]
    batch = next(iter(data.predict_dataloader()))
    assert not {"labels", "row_answers"} & set(batch)
    table = tmp_path / "new.csv"
    table.write_text("question,context\nWho?,Ada did.\n")
    assert len(QuestionData(path=str(table)).connect(tokenizer).predict_rows()) == 1


def test_other_formats_and_names_of_columns(tmp_path, tokenizer):
    path = tmp_path / "rows.parquet"
    rows = [row(i) for i in range(8)]
    Dataset.from_list(rows).rename_columns({"context": "passage", "answers": "gold"}).to_parquet(
        path
    )
    data = QuestionData(path=str(path), context="passage", answers="gold").connect(tokenizer)
    assert sorted(text for (text,) in data.targets("train")) == sorted(
        data.rows("train")[i]["gold"]["text"][0] for i in range(len(data.rows("train")))
    )
    with pytest.raises(DataError, match=r"`context` must be a column .* but is 'context' instead"):
        QuestionData(path=str(path), answers="gold").connect(tokenizer).setup("fit")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"question": " "}, "`question` must be a text, but is empty"),
        ({"context": None}, "`context` must be a text, but is empty"),
        ({"answers": None}, "`answers` must be a list, empty for a question without one"),
        ({"answers": {"text": ["Ada"], "answer_start": [0]}}, "'Ada' must stand at character 0 of"),
        ({"answers": {"text": [""], "answer_start": [0]}}, "must not be empty, but is"),
        ({"id": "3"}, "`id` must name one question, but row 4 has the same"),
    ],
)
def test_a_bad_row_is_told_or_left_out(tmp_path, tokenizer, bad, message):
    rows = [row(i) for i in range(9)] + [row(9) | bad]
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(
        DataError, match=r"^row 10 .*of `.*rows.jsonl` cannot be used: .*" + message
    ):
        QuestionData(path=path).connect(tokenizer).setup("fit")
    data = QuestionData(path=path, skip_bad_rows=True).connect(tokenizer)
    data.setup("fit")
    assert data.skipped["train"] == 1
    assert len(data.rows("train")) + len(data.rows("validation")) == 9


def test_the_nearest_true_place_of_an_answer_is_named():
    context = "Rome, and Rome again, and Rome."
    assert misplaced("Rome", 10, context) == ""
    assert "there is 'd Ro'; the nearest is at 10" in misplaced("Rome", 8, context)
    assert "there is nothing (it has 31); the nearest is at 26" in misplaced("Rome", 99, context)
    assert misplaced("Paris", 0, context).endswith("and nowhere else does it stand in it")
    assert "the nearest is at 0" in misplaced("Rome", -1, context)


def test_settings_that_cannot_be_meant_are_refused(path, tokenizer):
    with pytest.raises(ConfigError, match=r"`language` must be given for a path with"):
        QuestionData(path="xquad.{language}.json")
    with pytest.raises(ConfigError, match="`test` must be a share that leaves rows"):
        QuestionData(path=path, validation=0.5, test=0.6)
    with pytest.raises(ConfigError, match="`max_length` must be at most 512"):
        QuestionData(path=path, max_length=1024).connect(tokenizer)
    with pytest.raises(ConfigError, match=r"`connect\(tokenizer\)` must be called"):
        QuestionData(path=path).train_dataloader()


@pytest.mark.parametrize("documents", [1, 2])
def test_questions_of_too_few_documents_are_drawn_one_by_one(tmp_path, tokenizer, documents):
    rows = [row(i, title=f"book {i % documents}") for i in range(20)]
    path = write(tmp_path / "r.jsonl", rows)
    data = QuestionData(path=path, validation=0.1, test=0.2).connect(tokenizer)
    found = [{one["id"] for one in data.rows(split)} for split in ("train", "validation", "test")]
    assert [len(ids) for ids in found] == ([14, 2, 4] if documents == 1 else [9, 1, 10])
    assert len(set.union(*found)) == 20


def test_a_single_question_cannot_be_divided(tmp_path, tokenizer):
    data = QuestionData(path=write(tmp_path / "r.jsonl", [row(1)])).connect(tokenizer)
    with pytest.raises(DataError, match="at least 2 rows to hold one of them out, but there are 1"):
        data.setup("fit")


@pytest.mark.parametrize("column", ["id", "title"])
def test_what_is_no_name_is_told(tmp_path, tokenizer, column):
    rows = [row(i) | {column: [i]} for i in range(4)]
    data = QuestionData(path=write(tmp_path / "r.jsonl", rows)).connect(tokenizer)
    with pytest.raises(DataError, match=rf"^row 1 .*`{column}` must be a text or a number, but is"):
        data.setup("fit")
