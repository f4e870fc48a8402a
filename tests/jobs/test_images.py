"""Labelled images from the command line: a recipe, small, from fit to predictions."""

import csv
import json
from pathlib import Path

import pytest
import torch

from tests.jobs.command import Command, Run
from tests.jobs.test_runs import command


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with dark and bright noise, 24 of each to train on and 8 to be tested on."""
    from PIL import Image

    place = tmp_path_factory.mktemp("images")
    draw = torch.Generator().manual_seed(0)
    for split, count in (("train", 24), ("test", 8)):
        for label, level in (("bright", 130), ("dark", 40)):
            (place / split / label).mkdir(parents=True)
            for i in range(count):
                array = (level + torch.randint(0, 60, (16, 16), generator=draw)).to(torch.uint8)
                Image.fromarray(array.numpy()).save(place / split / label / f"{i}.png")
    return place


@pytest.fixture(scope="module")
def fitted(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Command]:
    from transformers import Dinov2Config, Dinov2Model

    from lightning_peft.conversions import write_image_processor

    model, folder = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("fitted")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**sizes, image_size=28, patch_size=7)).save_pretrained(model)
    write_image_processor(model, "BitImageProcessor", resample=3)
    return folder / "run", command(
        "experiment=images_textile",
        "model=hf",
        f"model.name={model}",
        f"data.path={images}",
        "data.test=null",
        "data.size=14",
        "data.batch_size=8",
        "data.augmentation={RandomHorizontalFlip: {p: 0.5}}",
        "optimizer.lr=0.01",
        "trainer.max_epochs=6",
        "folder=run",
        cwd=folder,
    )


def test_the_recipe_learns_and_reports(fitted: tuple[Path, Command]) -> None:
    folder, done = fitted
    assert done.code == 0, done.err
    for noise in ("Warning", "Traceback"):
        assert noise not in done.out + done.err
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    *frozen, tuned = report["results"]
    assert len(frozen) == 2
    assert tuned["test"]["accuracy"] > 0.9
    assert report["per_class"]["dark"]["images"] == 8


def test_a_folder_of_new_images_is_labelled(
    fitted: tuple[Path, Command], images: Path, run: Run
) -> None:
    Path("new/deep").mkdir(parents=True)
    for name, label in (("a", "dark"), ("deep/b", "bright")):
        source = images / "test" / label / "0.png"
        Path(f"new/{name}.png").write_bytes(source.read_bytes())
    done = run("job=predict", f"run={fitted[0]}", f"data.path={Path('new').absolute()}")
    assert done.code == 0, done.err
    with Path("new.predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["image", "label", "score", "probability_bright", "probability_dark"]
    assert [Path(row["image"]).name for row in rows] == ["a.png", "b.png"]
    assert [row["label"] for row in rows] == ["dark", "bright"]


def test_a_broken_image_is_named(fitted: tuple[Path, Command], run: Run) -> None:
    Path("bad/dark").mkdir(parents=True)
    Path("bad/dark/x.png").write_text("no image", encoding="utf-8")
    done = run("job=test", f"run={fitted[0]}", f"data.path={Path('bad').absolute()}")
    assert done.code == 1
    assert "bad/dark/x.png` cannot be read: it is no image" in done.err
    assert "Traceback" not in done.err
