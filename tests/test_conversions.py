"""Weights that packages hold in forms of their own."""

from pathlib import Path

import pytest
import torch
import yaml

from lightning_peft.conversions import converted, mobilenetv2_torch
from lightning_peft.errors import ConfigError
from lightning_peft.files.once import built_once
from lightning_peft.models import ModelSource, package_folder

CONF = Path(__file__).parents[1] / "conf" / "model"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return tmp_path / "assets"


def source(name: str) -> ModelSource:
    settings = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    del settings["defaults"]
    if package_folder(settings["package"]) is None:
        pytest.skip(f"{settings['package']} is not installed: run `make recipe-assets`")
    return ModelSource(**settings)


@pytest.mark.parametrize(("name", "parameters"), [("dinov2", 22056576), ("mobilenetv2", 2223872)])
def test_a_packaged_network_fills_every_parameter_but_the_head(name: str, parameters: int) -> None:
    model = source(name).load("AutoModelForImageClassification", num_labels=3)
    assert model.fresh_parameters == ("classifier.bias", "classifier.weight")
    assert sum(parameter.numel() for parameter in model.base_model.parameters()) == parameters
    size = source(name).image_processor().crop_size
    assert (size["height"], size["width"]) == (224, 224)


def test_it_is_converted_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = source("mobilenetv2").path()
    assert Path(first).is_relative_to(cache)
    monkeypatch.setattr(mobilenetv2_torch, "convert", pytest.fail)
    assert source("mobilenetv2").path() == first


def test_another_network_in_the_file_is_refused_and_leaves_nothing(
    cache: Path, tmp_path: Path
) -> None:
    file = tmp_path / mobilenetv2_torch.FILE
    torch.save({"weight": torch.zeros(2, 2)}, file)
    with pytest.raises(ConfigError, match="must hold a MobileNetV2 of width 1"):
        converted("mobilenetv2_torch", file, "0" * 64)
    left = [path for path in cache.rglob("*") if path.is_file()]
    assert all(path.parent.name == ".locks" for path in left)


def test_an_interrupted_build_is_begun_anew(cache: Path) -> None:
    def broken(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    def whole(folder: Path) -> None:
        (folder / "model.safetensors").write_text("")

    with pytest.raises(KeyboardInterrupt):
        built_once("kind", "abc", broken)
    folder = built_once("kind", "abc", whole)
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["abc"]


def test_an_unknown_converter_names_near_misses() -> None:
    with pytest.raises(ConfigError, match=r"but is 'dinov2' instead\. Did you mean `dinov2_onnx`"):
        ModelSource(name="x/y", converter="dinov2")
