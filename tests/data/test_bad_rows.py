"""Rows that cannot be used: refused with file and row, or left out and counted."""

import json

import pytest

from lightning_peft.data.bad_rows import BadRows
from lightning_peft.data.classification import ClassificationData
from lightning_peft.data.sources import read_file, read_files
from lightning_peft.errors import DataError
from tests.data.test_classification import texts, write

BAD = [
    ('{"text": "", "label": "good"}', "is empty in row 3"),
    ('{"label": "good"}', "is empty in row 3"),
    ('{"text": 5, "label": "good"}', "`text` is a number in row 3 and a text in most others"),
    ('{"text": ["a"], "label": "good"}', "`text` is a list in row 3"),
    ('{"text": "a"}', "missing in row 3"),
    ('{"text": "a", "label": "goood"}', "'goood' in row 3 of .* Did you mean `good`"),
    ('{"text": "a", "label": ', "damaged in line 3"),
    ("[1]", "has a list in line 3"),
    ('{"text": "caf\udce9", "label": "good"}', "must be UTF-8"),
]


@pytest.fixture(scope="module")
def tokenizer(minilm_dir):
    from lightning_peft.models import ModelSource

    return ModelSource(name=str(minilm_dir)).tokenizer()


def spoilt(path, line):
    lines = [json.dumps(row) for row in texts(20)]
    content = "\n".join([*lines[:2], line, *lines[2:]])
    path.write_bytes(content.encode(errors="surrogateescape"))
    return str(path)


@pytest.mark.parametrize(("line", "message"), BAD)
def test_a_bad_row_is_refused_with_file_and_place(tmp_path, tokenizer, line, message):
    path = spoilt(tmp_path / "rows.jsonl", line)
    data = ClassificationData(path=path, labels=["bad", "good"]).connect(tokenizer)
    with pytest.raises(DataError, match=message) as caught:
        data.setup("fit")
    assert "rows.jsonl" in str(caught.value)


@pytest.mark.parametrize(("line", "message"), BAD)
def test_or_left_out_and_counted(tmp_path, tokenizer, caplog, line, message):
    path = spoilt(tmp_path / "rows.jsonl", line)
    data = ClassificationData(path=path, labels=["bad", "good"], skip_bad_rows=True)
    with caplog.at_level("INFO"):
        data.connect(tokenizer).setup("fit")
    assert data.skipped["train"] == 1
    assert len(data.rows("train")) + len(data.rows("validation")) == 20
    assert "Left out 1 rows of" in caplog.text


def test_a_csv_loses_only_its_bad_rows(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"text,label\nok,1\na,b,c\ncaf\xe9,1\nfine,2\n")
    bad = BadRows(skip=True)
    rows = read_file(path, bad=bad)
    assert rows.to_list() == [{"text": "ok", "label": "1"}, {"text": "fine", "label": "2"}]
    assert "has 3 in the row that ends in line 3" in bad.reasons[0]
    assert "must be UTF-8" in bad.reasons[1]
    assert bad.number(1) == 4


def test_a_file_of_bad_rows_alone_is_refused_with_the_first_reason(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", [{"text": " ", "label": "a"}] * 3)
    data = ClassificationData(path=path, skip_bad_rows=True).connect(tokenizer)
    with pytest.raises(DataError, match=r"no row can be used: .*is empty in row 1"):
        data.setup("fit")


def test_a_column_that_no_row_has_is_refused_in_any_case(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", texts(5))
    data = ClassificationData(path=path, text="body", skip_bad_rows=True).connect(tokenizer)
    with pytest.raises(DataError, match="`text` must be a column of"):
        data.setup("fit")


def write_parts(folder):
    good, odd = ({"text": "some text", "label": label} for label in ("good", "odd"))
    for name, rows in (("1", [good] * 3), ("2", [good, odd]), ("3", [good])):
        lines = [json.dumps(row | {"text": f"{name} {i}"}) for i, row in enumerate(rows)]
        (folder / f"{name}.jsonl").write_text("\n".join(["{", *lines]) + "\n")
    return [folder / f"{name}.jsonl" for name in "123"]


def test_which_row_of_which_of_several_files_is_known(tmp_path):
    paths, bad = write_parts(tmp_path), BadRows(skip=True)
    rows = read_files(paths, bad=bad)
    odd = rows["label"].index("odd")
    assert bad.number(odd) == 7
    assert bad.place(odd) == f" That is row 3 of `{paths[1]}`."
    assert bad.place(0) == f" That is row 2 of `{paths[0]}`."
    assert bad.place(len(rows) - 1) == f" That is row 2 of `{paths[2]}`."
    alone = BadRows(skip=True)
    read_files(paths[:1], bad=alone)
    assert alone.place(0) == ""


@pytest.mark.parametrize("streaming", [False, True])
def test_of_several_files_the_one_with_a_bad_row_is_named(tmp_path, tokenizer, streaming):
    for path in write_parts(tmp_path):
        path.write_text(path.read_text().removeprefix("{\n"))
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"text": "held out", "label": "bad"}) + "\n")
    path = {"train": str(tmp_path / "[0-9].jsonl"), "validation": str(held)}
    data = ClassificationData(path=path, labels=["bad", "good"], streaming=streaming)
    with pytest.raises(DataError, match=r"row 5 of .* That is row 2 of `.*/2\.jsonl`\.$"):
        list(data.connect(tokenizer).train_dataloader())
