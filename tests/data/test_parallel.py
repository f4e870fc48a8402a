import gzip

import pytest

from lightning_peft.data.bad_rows import BadRows
from lightning_peft.data.parallel import read_parallel
from lightning_peft.errors import DataError


def write(path, content):
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def test_lines_belong_together_by_number(tmp_path):
    files = {
        "en": write(tmp_path / "a.en", "one\n\nthree"),
        "de": write(tmp_path / "a.de.gz", "\ufeffeins\r\nzwei\u2028zwo\r\ndrei\r\n"),
    }
    found = read_parallel(files, BadRows())
    assert found["en"] == ["one", "", "three"]
    assert found["de"] == ["eins", "zwei\u2028zwo", "drei"]  # only a line feed ends a line


def test_unequal_lengths_are_refused_with_both_counts(tmp_path):
    files = {
        "en": write(tmp_path / "a.en", "one\ntwo\n"),
        "de": write(tmp_path / "a.de", "eins\nzwei\ndrei\n"),
    }
    with pytest.raises(DataError, match=r"a\.en` has 2 and `.*a\.de` has 3"):
        read_parallel(files, BadRows(skip=True))


def test_a_line_that_is_not_utf8_spoils_its_row_alone(tmp_path):
    files = {
        "en": write(tmp_path / "a.en", "one\ntwo\nthree\n"),
        "de": write(tmp_path / "a.de", b"eins\nzw\xf6lf\ndrei\n"),
    }
    with pytest.raises(DataError, match=r"a\.de` must be UTF-8, but is not in line 2"):
        read_parallel(files, BadRows())
    bad = BadRows(skip=True)
    assert read_parallel(files, bad)["en"] == ["one", "three"]
    assert bad.number(1) == 3
    assert len(bad.reasons) == 1


def test_several_files_belong_together_by_name(tmp_path):
    for part in ("2", "10"):
        write(tmp_path / f"p{part}.en", f"{part} a\n{part} b\n")
        write(tmp_path / f"q-{part}.de", f"{part} A\n{part} B\n")
    files = {"en": str(tmp_path / "p*.en"), "de": str(tmp_path / "q-*.de")}
    found = read_parallel(files, BadRows())
    assert found["en"] == ["10 a", "10 b", "2 a", "2 b"]
    assert found["de"] == ["10 A", "10 B", "2 A", "2 B"]
    write(tmp_path / "q-10.de", b"\xff\n10 B\n")
    write(tmp_path / "q-2.de", b"2 A\n\xff\n")
    with pytest.raises(DataError, match=r"q-10\.de` must be UTF-8, but is not in line 1"):
        read_parallel(files, BadRows())
    bad = BadRows(skip=True)
    assert read_parallel(files, bad)["de"] == ["10 B", "2 A"]
    assert [bad.number(i) for i in range(2)] == [2, 3]


def test_several_files_belong_together_whatever_stands_behind_their_numbers(tmp_path):
    for part in ("1", "10"):
        write(tmp_path / f"p{part}_en.txt", f"{part} a\n")
        write(tmp_path / f"p{part}.de", f"{part} A\n")
    files = {"en": str(tmp_path / "p*_en.txt"), "de": str(tmp_path / "p*.de")}
    found = read_parallel(files, BadRows())
    assert found["en"] == ["1 a", "10 a"]
    assert found["de"] == ["1 A", "10 A"]


def test_several_files_without_a_counterpart_are_refused(tmp_path):
    for name in ("p1.en", "p2.en", "p1.de", "p3.de"):
        write(tmp_path / name, "x\n")
    files = {"en": str(tmp_path / "p*.en"), "de": str(tmp_path / "p*.de")}
    with pytest.raises(
        DataError, match=r"p\*\.en` is p1\.en, p2\.en and .*p\*\.de` is p1\.de, p3\.de"
    ):
        read_parallel(files, BadRows())
    (tmp_path / "p3.de").rename(tmp_path / "p2.de")
    assert len(read_parallel(files, BadRows())) == 2
    assert (
        len(
            read_parallel({"en": str(tmp_path / "*1.en"), "de": str(tmp_path / "p1.de")}, BadRows())
        )
        == 1
    )
    with pytest.raises(DataError, match="must match at least one file"):
        read_parallel({"en": str(tmp_path / "r*.en")}, BadRows())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.en", b"", "at least one line"),
        ("a.en.gz", b"", "at least one line"),
        ("missing.en", None, "does not exist. Did you mean `missing.de`"),
    ],
)
def test_files_that_hold_nothing_are_refused(tmp_path, name, content, message):
    write(tmp_path / "missing.de", "x\n")
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        read_parallel({"en": str(tmp_path / name)}, BadRows())


def test_a_damaged_archive_is_refused(tmp_path):
    whole = gzip.compress(b"one\n" * 1000)
    for content in (whole[:-20], b"no archive\n"):
        (tmp_path / "a.en.gz").write_bytes(content)
        with pytest.raises(DataError, match="cannot be read"):
            read_parallel({"en": str(tmp_path / "a.en.gz")}, BadRows())
