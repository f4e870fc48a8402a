import json
import random
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from lightning_peft.config import instantiate, to_spec
from lightning_peft.errors import ConfigError, DataError
from lightning_peft.models import ModelSource
from lightning_peft.pretraining import Translator

SMALL = {"vocabulary": 280, "d_model": 16, "d_ff": 16, "layers": 1, "heads": 2, "epochs": 1}
pytestmark = pytest.mark.filterwarnings("ignore:The '.*' does not have many workers")


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "cache"))
    draw = random.Random(0)
    for split, count in (("train", 24), ("validation", 4)):
        rows = ["".join(draw.choices("abcd", k=6)) for _ in range(count)]
        for side in ("source", "target"):
            text = "\n".join(row.upper() if side == "target" else row for row in rows)
            (tmp_path / f"{split}.{side}").write_text(text, encoding="utf-8")
    return {
        split: {side: str(tmp_path / f"{split}.{side}") for side in ("source", "target")}
        for split in ("train", "validation")
    }


def test_a_base_is_trained_once_and_anew_for_other_files_or_settings(path):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = Translator(path=path, **SMALL).folder()
    assert torch.equal(torch.get_rng_state(), state)
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert Translator(path=path, **SMALL).folder() == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    assert json.loads((first / "training.json").read_text())["epochs"] == 1
    assert Translator(path=path, **SMALL | {"seed": 1}).folder() != first
    with Path(path["train"]["source"]).open("a", encoding="utf-8") as file:
        file.write("x")
    assert Translator(path=path, **SMALL).folder() != first


def test_a_model_source_trains_its_base_and_describes_it(path):
    source = ModelSource(name="my-translator", trained=Translator(path=path, **SMALL))
    model, tokenizer = source.load("AutoModelForSeq2SeqLM"), source.tokenizer()
    assert model.config.name_or_path == "my-translator"
    assert model.fresh_parameters == ()
    assert tokenizer.decode(tokenizer("abcd äß")["input_ids"]).strip() == "abcd äß</s>"
    assert instantiate(to_spec(source)) == source


def test_what_cannot_be_trained_is_refused(path):
    with pytest.raises(ConfigError, match="must name a source and a target for train"):
        Translator(path={"train": path["train"]})
    with pytest.raises(ConfigError, match=r"`d_model` must be a multiple of `heads` \(4\)"):
        Translator(path=path, d_model=30)
    gone = {**path, "train": {**path["train"], "target": "gone.de"}}
    with pytest.raises(DataError, match=r"'gone\.de' does not exist"):
        Translator(path=gone).folder()
