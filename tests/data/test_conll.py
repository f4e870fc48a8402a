from pathlib import Path

import pytest

from lightning_peft.data.bad_rows import BadRows
from lightning_peft.data.sources import read_file
from lightning_peft.errors import DataError

WNUT = Path(__file__).parents[3] / "shared" / "data" / "wnut17"


def read(tmp_path, content, bad=None):
    path = tmp_path / "rows.conll"
    path.write_bytes(content)
    return read_file(path, bad=bad)


@pytest.mark.parametrize(
    "content",
    [
        b"Ada\tB-person\nsleeps\tO\n\t\nHi\tO\n",
        b"Ada NNP B-NP B-person\nsleeps VBZ B-VP O\n\nHi UH O O",
        b"-DOCSTART- -X- O O\n\n# id 1\nAda B-person\nsleeps O\n\n\n\nHi O\n\n",
        b"\xef\xbb\xbfAda\tB-person\r\nsleeps\tO\r\n\r\nHi\tO\r\n",
    ],
)
def test_the_usual_layouts_are_read_alike(tmp_path, content):
    rows = read(tmp_path, content)
    assert rows.to_list() == [
        {"tokens": ["Ada", "sleeps"], "labels": ["B-person", "O"]},
        {"tokens": ["Hi"], "labels": ["O"]},
    ]


def test_a_hash_that_is_tagged_is_a_word(tmp_path):
    assert read(tmp_path, b"# O\nwin O\n")["tokens"] == [["#", "win"]]


def test_other_spaces_are_part_of_a_word(tmp_path):
    rows = read(tmp_path, "10\u00a0000  CD  O \nkm O\n".encode())
    assert rows.to_list() == [{"tokens": ["10\u00a0000", "km"], "labels": ["O", "O"]}]


def test_words_alone_have_no_labels(tmp_path):
    assert read(tmp_path, b"Ada\nsleeps\n\nHi\n").to_list() == [
        {"tokens": ["Ada", "sleeps"]},
        {"tokens": ["Hi"]},
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"Ada B-person\nsleeps\n", r"a word and its label in each line, but has \['sleeps'\] in"),
        (b"Ada\tB-person\n\tO\n", "a word in each line, but has none in line 2"),
        (b"Ada B-person\ncaf\xe9 O\n", "must be UTF-8, but has the byte 0xe9 in line 2"),
        (b"\n\n", "at least one row"),
    ],
)
def test_damaged_files_are_refused_with_their_line(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, content)


def test_only_the_sentences_that_cannot_be_read_are_left_out(tmp_path):
    bad = BadRows(skip=True)
    rows = read(tmp_path, b"a O\n\nb\n\nc O\n\ncaf\xe9 O\n\nd O\n", bad)
    assert rows["tokens"] == [["a"], ["c"], ["d"]]
    assert len(bad.reasons) == 2
    assert [bad.number(i) for i in range(3)] == [1, 3, 5]


@pytest.mark.skipif(not WNUT.is_dir(), reason="shared/data/wnut17 is not beside the repository")
def test_a_real_corpus():
    rows = read_file(WNUT / "test.conll")
    assert len(rows) == 1287
    assert all(len(r["tokens"]) == len(r["labels"]) for r in rows)
