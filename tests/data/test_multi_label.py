import json

import pytest
import torch

from lightning_peft.data.multi_label import MultiLabelData
from lightning_peft.errors import ConfigError, DataError
from lightning_peft.models import ModelSource

ROWS = [("one thing", ["a", "b"]), ("another", []), ("a third", ["c"]), ("a fourth", ["b"])]


@pytest.fixture(scope="module")
def tokenizer(minilm_dir):
    return ModelSource(name=str(minilm_dir)).tokenizer()


def write(path, content) -> dict[str, str]:
    path.write_text(content)
    return {"train": str(path), "test": str(path)}


def lists(path, rows=ROWS):
    return write(path, "".join(json.dumps({"text": t, "labels": ls}) + "\n" for t, ls in rows))


@pytest.mark.parametrize(
    ("name", "content", "settings"),
    [
        ("t.jsonl", "".join(json.dumps({"text": t, "labels": n}) + "\n" for t, n in ROWS), {}),
        ("t.csv", "text,labels\n" + "".join(f'{t},"{", ".join(n)}"\n' for t, n in ROWS), {}),
        (
            "t.tsv",
            "text\tlabels\n" + "".join(f"{t}\t{'|'.join(n)}\n" for t, n in ROWS),
            {"separator": "|"},
        ),
        (
            "t.csv",
            "text,a,b,c\n"
            + "".join(f"{t},{','.join(str(int(x in n)) for x in 'abc')}\n" for t, n in ROWS),
            {"label": ["a", "b", "c"]},
        ),
    ],
)
def test_every_way_to_write_labels_gives_the_same(tmp_path, tokenizer, name, content, settings):
    data = MultiLabelData(path=write(tmp_path / name, content), **settings).connect(tokenizer)
    assert data.labels == ("a", "b", "c")
    assert data.targets("test") == [names for _, names in ROWS]
    batch = next(iter(data.test_dataloader()))
    expected = torch.tensor([[1.0, 1, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0]])
    assert torch.equal(batch["labels"], expected)
    assert data.label_counts("test") == {"a": 1, "b": 2, "c": 1}


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        (("x", ["d"]), {"labels": ["a", "b", "c"]}, "must be among a, b, c, but hold 'd'"),
        ((" ", ["a"]), {}, "is empty in row 5"),
        (("x", [None]), {}, r"must be a list of texts, but are \[None\]"),
    ],
)
def test_a_bad_row_is_told_or_left_out(tmp_path, tokenizer, row, settings, message):
    path = {"test": lists(tmp_path / "t.jsonl", [*ROWS, row])["test"]}
    settings = {"labels": ["a", "b", "c"]} | settings
    with pytest.raises(DataError, match=message):
        MultiLabelData(path=path, **settings).connect(tokenizer).setup("test")
    data = MultiLabelData(path=path, skip_bad_rows=True, **settings).connect(tokenizer)
    assert len(data.rows("test")) == 4
    assert data.skipped["test"] == 1


def test_columns_hold_0_or_1(tmp_path, tokenizer):
    path = write(tmp_path / "t.csv", "text,a,b\nx,1,0\ny,2,0\n")
    data = MultiLabelData(path=path, label=["a", "b"]).connect(tokenizer)
    with pytest.raises(DataError, match=r"row 2 of .* must be 0 or 1 in each column, but are '2'"):
        data.setup("test")
    with pytest.raises(DataError, match=r"`label\.c` must be a column of"):
        MultiLabelData(path=path, label=["a", "c"]).connect(tokenizer).setup("test")
    with pytest.raises(ConfigError, match="`labels` must be the columns of `label`"):
        MultiLabelData(path=path, label=["a", "b"], labels=["a"])


def test_rows_without_any_label_cannot_be_trained_on(tmp_path, tokenizer):
    path = lists(tmp_path / "t.jsonl", [("x", []), ("y", [])])
    with pytest.raises(DataError, match="must hold at least one label"):
        _ = MultiLabelData(path=path).connect(tokenizer).labels
