import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from lightning_peft.data import sources
from lightning_peft.data.bad_rows import BadRows
from lightning_peft.data.sources import (
    bad_texts,
    read_file,
    read_hub,
    require_columns,
    stream_file,
)
from lightning_peft.errors import DataError
from lightning_peft.models import HubAnswer

ROWS = [
    {"text": 'He said "no, never"\nand left', "label": "bad"},
    {"text": "NA", "label": "null"},
    {"text": "naïve Ærøskøbing 🍵", "label": "007"},
]


def write_csv(path: Path, separator: str = ",") -> None:
    import csv

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label"], delimiter=separator)
        writer.writeheader()
        writer.writerows(ROWS)


def test_csv_keeps_every_text_as_written(tmp_path):
    write_csv(tmp_path / "rows.csv")
    assert read_file(tmp_path / "rows.csv").to_list() == ROWS


def test_csv_may_start_with_a_byte_order_mark_and_hold_blank_lines_and_long_fields(tmp_path):
    path = tmp_path / "excel.csv"
    path.write_text("text,label\r\n\r\ngood tea,1\r\n" + "x" * 200_000 + ",0\r\n", "utf-8-sig")
    rows = read_file(path)
    assert rows.column_names == ["text", "label"]
    assert [len(text) for text in rows["text"]] == [8, 200_000]


def test_tsv_takes_a_lone_quotation_mark_for_text(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text('text\tlabel\n"unclosed\t1\nplain\t0\n')
    assert read_file(path)["text"][:] == ['"unclosed', "plain"]


def test_columns_names_those_of_a_file_without_a_header(tmp_path):
    path = tmp_path / "sst.tsv"
    path.write_text("a gob of drivel\t0\nfine work\t1\n")
    assert read_file(path, columns=["sentence", "label"]).to_list() == [
        {"sentence": "a gob of drivel", "label": "0"},
        {"sentence": "fine work", "label": "1"},
    ]


def test_json_lines_keep_types_and_fill_missing_keys_with_none(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": 1}\n\n{"text": "b", "more": true}\n')
    assert read_file(path).to_list() == [
        {"text": "a", "label": 1, "more": None},
        {"text": "b", "label": None, "more": True},
    ]


def test_parquet_is_read_and_a_changed_file_is_never_stale(tmp_path):
    path = tmp_path / "rows.parquet"
    Dataset.from_list(ROWS).to_parquet(path)
    assert read_file(path).to_list() == ROWS
    Dataset.from_list(ROWS[:1]).to_parquet(path)
    assert read_file(path).to_list() == ROWS[:1]


def test_reading_leaves_nothing_beside_the_file(tmp_path):
    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    write_csv(tmp_path / "rows.csv")
    for path in sorted(tmp_path.iterdir()):
        read_file(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.csv", "rows.parquet"]


def test_the_format_can_be_named(tmp_path):
    write_csv(tmp_path / "rows.data", "\t")
    path = tmp_path / "rows.data"
    with pytest.raises(DataError, match=r"`path` must end in \.csv.*set `format` to one of csv"):
        read_file(path)
    path.write_text(json.dumps(ROWS[0]))
    assert read_file(path, "jsonl").to_list() == ROWS[:1]
    with pytest.raises(DataError, match=r"`format` must be one of .* but is 'json' instead.*jsonl"):
        read_file(path, "json")
    with pytest.raises(DataError, match="`columns` must be left out for jsonl"):
        read_file(path, "jsonl", columns=["text"])


def test_what_editors_leave_in_a_csv_file_is_no_row(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"text , label\r\na,1\r\n  \r\n,,\r\nb,\r\n\r\nonly\r\n")
    bad = BadRows(skip=True)
    assert read_file(path, bad=bad).to_list() == [
        {"text": "a", "label": "1"},
        {"text": "b", "label": ""},
    ]
    assert len(bad.reasons) == 1
    assert bad.reasons[0].endswith("has 1 in the row that ends in line 7.")
    path.write_text('text\na\n""\n')
    assert read_file(path)["text"] == ["a", ""]


@pytest.mark.parametrize(
    ("column", "values"),
    [
        (pa.array(["a", "b"]).dictionary_encode(), ["a", "b"]),
        (pa.array(["a", "b"], pa.large_string()), ["a", "b"]),
        (pa.array(["a", "b"], pa.string_view()), ["a", "b"]),
        (pa.nulls(2), [None, None]),
        (pa.array([["a"], []], pa.large_list(pa.large_string())), [["a"], []]),
    ],
)
def test_parquet_is_read_whatever_its_types(tmp_path, column, values):
    pq.write_table(pa.table({"text": column}), tmp_path / "rows.parquet")
    assert read_file(tmp_path / "rows.parquet")["text"][:] == values
    (block,) = stream_file(tmp_path / "rows.parquet", None, BadRows(), 2)
    assert block["text"][:] == values


def test_parquet_that_holds_nothing_usable_is_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    with pytest.raises(DataError, match="must hold at least one row, but has none"):
        read_file(path)
    pq.write_table(pa.table({"m": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int8()))}), path)
    with pytest.raises(DataError, match=r"cannot be read as Parquet: Arrow type map<"):
        read_file(path)
    with pytest.raises(DataError, match=r"cannot be read as Parquet: Arrow type map<"):
        list(stream_file(path, None, BadRows(), 2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "at least one row"),
        (b"text,label\n", "at least one row"),
        (b"text,label\na,b,c\n", r"2 fields in each row \(text, label\), but has 3 .* line 2"),
        (b"text,label\na,1\nonly one\n", "but has 1 in the row that ends in line 3"),
        (b"text,text\na,b\n", "name each column once"),
        (b'text,label\n"open,1\nb,2\n', "damaged in line 3: unexpected end of data"),
        (b'text,label\n"a" b,1\n', "damaged in line 2"),
        (b"text,label\nok,1\ncaf\xe9,1\n", "must be UTF-8, but has the byte 0xe9 in line 3"),
        (b"text,label\nok,1\ncaf\xc3", "must be UTF-8"),
    ],
)
def test_damaged_csv_is_refused_with_its_line(tmp_path, content, message):
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_file(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": }\n', "damaged in line 2"),
        ('{"text": "a"}\n[1, 2]\n', "one JSON object in each row, but has a list in line 2"),
        ('{"text": "a"}\n{"text": 3}\n', "values of one type a column"),
        ('{"text": "a"}\n{"text": ["b"]}\n', "values of one type a column"),
        ("", "at least one row"),
        (
            '{"n": 1}\n{"n": 9223372036854775808}\n',
            "a number as `n`, but has a number of more than",
        ),
        ('{"n": 1}\n{"n": ' + "9" * 5000 + "}\n", "damaged in line 2: Exceeds the limit"),
        ('{"n": 18446744073709551616}\n', "a number as `n`, but has a number of more than 64 bits"),
        ('{"t": "a"}\n{"t": {"u": "\\ud800"}}\n{"t": {"u": "b"}}', "but `t` is a text in row 1"),
        ('{"t": "\\ud800"}\n', "a text as `t`, but has a text that is not UTF-8 in row 1"),
        ('{"\\ud800": "a"}\n', "an object with a key that is not UTF-8 in line 1"),
        (
            '{"t": {"\\ud800": "a"}}\n',
            "as `t`, but has an object with a key that is not UTF-8 in row",
        ),
        (
            '{"t": []}\n{"t": ' + "[" * 60 + "]" * 60 + "}\n",
            "damaged in line 2: .* at most 50 deep",
        ),
        ('{"t": 1}\n{"t": ' + "[" * 9999 + "]" * 9999 + "}\n", "damaged in line 2: .* 50 deep"),
        ("[1]\n[2]\n", "one JSON object in each row, but has a list in line 1"),
        ('[{"text": "a"},\n{"text": ]\n', "damaged in line 2"),
        ('[{"text": "a"}, 3]', "one JSON object in each row, but has a number in row 2"),
        (
            '[{"text": "a"}, {"text": "b"}, {"text": 3}]',
            "`text` is a number in row 3 and a text in",
        ),
        ("[" * 60 + "]" * 60, "cannot be read: lists and objects must stand in each other at most"),
        ("[]", "at least one row"),
    ],
)
def test_damaged_json_lines_are_refused_with_their_line(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read_file(path)
    assert str(caught.value).count(str(path)) == 1


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("begin", ["", "\ufeff", "\r\n "])
def test_a_list_of_objects_is_read(tmp_path, indent, begin):
    path = tmp_path / "rows.json"
    path.write_text(begin + json.dumps(ROWS, indent=indent), encoding="utf-8", newline="\r\n")
    assert read_file(path).to_list() == ROWS


def test_a_bad_object_of_a_list_is_left_out_when_asked(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(b'[{"t": "a"}, {"t": "\xff"}, 7, {"t": "b [[["}, {"t": 5}, {"t": "c"}]')
    bad = BadRows(skip=True)
    assert [row["t"] for row in read_file(path, bad=bad)] == ["a", "b [[[", "c"]
    assert [bad.number(i) for i in range(3)] == [1, 4, 6]
    assert len(bad.reasons) == 3


def test_damaged_parquet_is_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match="cannot be read as Parquet") as caught:
        read_file(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_told_with_its_near_misses(tmp_path):
    write_csv(tmp_path / "reviews.csv")
    with pytest.raises(DataError, match=r"does not exist. Did you mean `reviews.csv`\?"):
        read_file(tmp_path / "review.csv")
    with pytest.raises(DataError, match="is a folder"):
        read_file(tmp_path)


def test_a_missing_column_is_told_with_those_that_exist():
    rows = Dataset.from_list(ROWS)
    require_columns(rows, "`f.csv`", text="text", label="label", text_pair=None)
    with pytest.raises(
        DataError,
        match=r"`text` must be a column of `f.csv` \(text, label\), but is 'txt' instead. "
        r"Did you mean `text`\?",
    ):
        require_columns(rows, "`f.csv`", text="txt")


@pytest.mark.parametrize(
    ("texts", "bad", "message"),
    [
        (["a", " \n", "c", None], [1, 3], "is empty in row 2 (2 such rows)"),
        (["a", "b", None], [2], "is empty in row 3: fill"),
        ([1, 2, 3], [0, 1, 2], "is 1 in row 1"),
    ],
)
def test_rows_without_a_text_are_told_by_number(texts, bad, message):
    found = bad_texts(Dataset.from_dict({"text": texts}), "`f.csv`", "text")
    assert list(found) == bad
    assert message in found[bad[0]]


@pytest.mark.parametrize("answer", [a for a in HubAnswer if a is not HubAnswer.FOUND])
def test_an_unreachable_data_set_is_one_sentence(monkeypatch, answer):
    monkeypatch.setattr(sources, "ask_hub", lambda name, kind: answer)
    with pytest.raises(DataError, match="`hub` must be a data set on the hub, but 'no/such' ") as e:
        read_hub("no/such")
    assert "\n" not in str(e.value)
    assert "`path`" in str(e.value)
