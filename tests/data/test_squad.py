import json

import pytest

from lightning_peft.data.bad_rows import BadRows
from lightning_peft.data.sources import read_file, read_files
from lightning_peft.data.squad import answers_of
from lightning_peft.errors import DataError

CONTEXT = "Ada Lovelace lived in London."


def question(number=1, **more):
    answers = [{"text": "London", "answer_start": 22}]
    return {"id": f"q{number}", "question": f"Where {number}?", "answers": answers} | more


def nested(*questions, **paragraph):
    paragraphs = [{"context": CONTEXT, "qas": list(questions)} | paragraph]
    return {"version": "1.1", "data": [{"title": "Ada", "paragraphs": paragraphs}]}


def write(tmp_path, document, name="questions.json"):
    path = tmp_path / name
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def read(path, skip=False):
    bad = BadRows(skip)
    return read_file(path, "squad", bad=bad).to_list(), bad


FLAT = [
    {"title": "Ada", "context": CONTEXT, "answers": {"text": ["London"], "answer_start": [22]}}
    | {"id": f"q{number}", "question": f"Where {number}?"}
    for number in (1, 2)
]


@pytest.mark.parametrize(
    "document",
    [
        nested(question(1), question(2)),
        nested(question(1), question(2))["data"],
        {"data": FLAT},
        FLAT,
        "\n".join(json.dumps(row) for row in FLAT),
        json.dumps(nested(question(1), question(2)), indent=2),
    ],
    ids=["squad", "articles", "rows under data", "rows", "a row a line", "indented"],
)
def test_forms_give_the_same_rows(tmp_path, document):
    rows, _ = read(write(tmp_path, document))
    assert rows == FLAT


def test_numbers_that_name_a_question_become_texts(tmp_path):
    document = nested(question(id=7), question(id=8))
    document["data"][0]["title"] = 12
    rows, _ = read(write(tmp_path, document))
    assert [(row["id"], row["title"]) for row in rows] == [("7", "12"), ("8", "12")]


def test_of_several_files_the_right_one_and_its_row_are_told(tmp_path):
    odd = FLAT[0] | {"answers": {"text": ["x"], "answer_start": []}}
    for name, rows in (("1", FLAT), ("2", [FLAT[0], odd, FLAT[1]])):
        write(tmp_path, "\n".join(map(json.dumps, rows)), f"{name}.jsonl")
    paths = [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]
    with pytest.raises(DataError, match=r"2\.jsonl` cannot be used in row 2: `answers` must have"):
        read_files(paths, "squad")
    bad = BadRows(skip=True)
    assert len(read_files(paths, "squad", bad=bad)) == 4
    assert [bad.number(i) for i in range(4)] == [1, 2, 3, 5]


def test_a_question_without_an_answer_has_none(tmp_path):
    impossible = question(2, is_impossible=True, answers=[], plausible_answers=[{"text": "x"}])
    rows, _ = read(write(tmp_path, nested(question(1, is_impossible=False), impossible)))
    assert [row["answers"]["text"] for row in rows] == [["London"], []]


def test_what_is_predicted_needs_no_answers(tmp_path):
    asked = {"question": "Where?", "id": "a"}
    rows, _ = read(write(tmp_path, nested(asked)))
    assert rows == [{"id": "a", "title": "Ada", "context": CONTEXT, "question": "Where?"}]
    rows, _ = read(write(tmp_path, {"context": "x", "question": "Where?", "mine": 3}))
    assert rows[0]["question"] == "Where?"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"articles": []}, "at its top: questions must be nested as `data`, .* here is articles"),
        ({"data": {"paragraphs": []}}, "at data: `data` must be a list of articles, but is {"),
        (nested("Where?"), r"at data\[0\].paragraphs\[0\].qas\[0\]: .* but here is 'Where\?'"),
        (nested({"id": "x"}), r"qas\[0\]: questions must be nested .* but here is id"),
        ({"data": [{"title": "Ada", "paragraphs": [{"context": "x"}]}]}, "but here is context"),
        (nested(question(context=7)), "`context` must be a text, but is 7"),
        (nested(question(answers="London")), "`answers` must have `text` and .* is 'London'"),
        (nested(question(answers=[{"text": "London"}])), "`answer_start` must be a whole number"),
        (nested(question(is_impossible=True)), "`is_impossible` must be false for a question with"),
        (nested(question(id="\ud800")), "`id` must be UTF-8"),
        (nested(question(id=["a"])), r"`id` must be a text, but is \['a'\]"),
    ],
)
def test_what_is_nested_or_typed_otherwise_is_told(tmp_path, document, message):
    with pytest.raises(DataError, match=f"questions.json` cannot be used .*{message}"):
        read(write(tmp_path, document))


def test_a_bad_question_is_left_out_when_asked(tmp_path):
    path = write(tmp_path, nested(question(1), question(2, answers=[{"text": 1}]), question(3)))
    rows, bad = read(path, skip=True)
    assert [row["id"] for row in rows] == ["q1", "q3"]
    assert bad.number(1) == 3
    assert "qas[1]" in bad.reasons[0]


def test_a_bad_line_is_left_out_when_asked(tmp_path):
    lines = [FLAT[0], FLAT[0] | {"answers": {"text": ["x"], "answer_start": ["3"]}}, FLAT[1]]
    path = write(tmp_path, "\n".join(json.dumps(row) for row in lines), "questions.jsonl")
    with pytest.raises(DataError, match=r"`answers\.answer_start.* is a text in row 2"):
        read(path)
    rows, bad = read(path, skip=True)
    assert rows == FLAT
    assert bad.number(1) == 3


def test_a_damaged_document_names_its_line(tmp_path):
    text = json.dumps(nested(question()), indent=1).replace('"qas"', "qas")
    with pytest.raises(DataError, match=r"questions\.json` is damaged in line 9"):
        read(write(tmp_path, text))
    with pytest.raises(DataError, match="at least one row, but has none"):
        read(write(tmp_path, {"data": []}))


def test_a_document_in_another_encoding_is_told(tmp_path):
    path = tmp_path / "questions.json"
    document = nested(question(question="Où?"))
    path.write_bytes(json.dumps(document, ensure_ascii=False).encode("latin-1"))
    with pytest.raises(DataError, match="must be UTF-8, but has the byte 0xf9 in line 1"):
        read(path)
    path.write_bytes(
        json.dumps(nested(question(1, question="Où?"), question(2)), ensure_ascii=False).encode(
            "latin-1"
        )
    )
    rows, bad = read(path, skip=True)
    assert [row["id"] for row in rows] == ["q2"]
    assert "`question` must be UTF-8" in bad.reasons[0]


def test_answers_come_in_several_forms():
    one = {"text": ["a"], "answer_start": [3]}
    assert answers_of([{"text": "a", "answer_start": 3}]) == one
    assert answers_of({"text": "a", "answer_start": 3}) == one
    assert answers_of(one) == one
    assert answers_of([]) == {"text": [], "answer_start": []}
    assert answers_of(None) is None
    assert "a `text` for each" in answers_of({"text": ["a"], "answer_start": []})
