"""Labelled images as people keep them: folders, tables of paths, and what is wrong with some."""

import csv
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from lightning_peft.data.image_origin import ImageOrigin
from lightning_peft.data.images import open_image, without_warnings
from lightning_peft.data.labelled_images import ImageData
from lightning_peft.data.pixels import unaugmented
from lightning_peft.errors import ConfigError, DataError

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0)}


def paint(path: Path, colour: tuple[int, int, int], number: int, size=(12, 10)) -> Path:
    """Write an image of one colour whose first pixel is its number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, colour)
    image.putpixel((0, 0), (number, 0, 0))
    image.save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with five images of each of two labels."""
    for label, colour in COLOURS.items():
        for i in range(5):
            paint(tmp_path / "all" / label / f"{i}.png", colour, i)
    return tmp_path / "all"


@pytest.fixture(scope="module")
def processor():
    """An image processor that scales to 8 pixels, cuts out 6 and normalises to -1 ... 1."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    return ViTImageProcessorPil(size={"height": 6, "width": 6})


def test_folders_are_labels_and_their_names_are_sorted(folder, processor):
    data = ImageData(path=str(folder), validation=0.2, batch_size=16).connect(processor)
    data.setup("fit")
    assert data.labels == ("blue", "green")
    assert data.label_counts("train") == {"blue": 4, "green": 4}
    assert data.label_counts("validation") == {"blue": 1, "green": 1}
    batch = next(iter(data.train_dataloader()))
    assert batch["pixel_values"].shape == (8, 3, 6, 6)
    for pixels, label in zip(batch["pixel_values"], batch["labels"], strict=True):
        expected = torch.tensor(COLOURS[data.labels[label]]) / 127.5 - 1
        assert torch.allclose(pixels[:, 3, 3], expected, atol=0.02)
    assert set(data.rows("train")[0]) == {"image", "label"}
    assert not set(data.inputs("train")) & set(data.inputs("validation"))


def test_folders_of_splits_are_found(folder, processor, tmp_path):
    place = tmp_path / "published"
    for name in ("training", "val", "test"):
        for i, (label, colour) in enumerate(COLOURS.items()):
            paint(place / name / label / "x.png", colour, len(name) + i)
    data = ImageData(path=str(place)).connect(processor)
    assert [len(data.inputs(split)) for split in ("train", "validation", "test")] == [2, 2, 2]
    assert data.targets("test") == ["blue", "green"]
    assert len(data.inputs("predict")) == 6
    assert ImageOrigin(path={"test": str(folder)}).read("train", None) is None


def test_folders_of_splits_are_found_in_any_case(folder, tmp_path):
    folder.rename(tmp_path / "Train")
    paint(tmp_path / "TEST" / "blue" / "x.png", (0, 0, 0), 9)
    data = ImageData(path=str(tmp_path))
    assert data.labels == ("blue", "green")
    assert data.targets("test") == ["blue"]


def test_a_label_may_be_called_like_a_split(folder):
    paint(folder / "train" / "locomotive.png", (9, 9, 9), 0)
    assert ImageData(path=str(folder)).labels == ("blue", "green", "train")


def test_bare_folders_of_splits_are_no_labels(tmp_path):
    for name in ("train", "test"):
        paint(tmp_path / name / "x.png", (0, 0, 0), len(name))
    with pytest.raises(DataError, match="folder with images for each label, but has no folders"):
        ImageData(path=str(tmp_path)).setup("fit")


def test_folders_within_the_folder_of_a_label_are_refused(folder, tmp_path):
    folder.rename(tmp_path / "first half")
    message = (
        r"`first half` has them in folders of its own \(blue, green\).*path='\{train: <folder>"
    )
    with pytest.raises(DataError, match=message):
        ImageData(path=str(tmp_path)).setup("fit")
    for file in list((tmp_path / "first half" / "green").iterdir()):
        file.rename(tmp_path / "first half" / f"g{file.name}")
    paint(tmp_path / "other" / "x.png", (0, 0, 0), 9)
    assert ImageData(path=str(tmp_path)).labels == ("first half", "other")


@pytest.mark.parametrize("column", ["image", "file"])
def test_a_table_of_paths_is_relative_to_its_folder(folder, processor, column):
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([column, "label", "camera"])
        writer.writerows([f"{c}/{i}.png", c, "A"] for c in COLOURS for i in range(5))
    data = ImageData(path=str(folder / "labels.csv"), image=column).connect(processor)
    assert data.targets("validation") == ["blue", "green"]
    row = data.rows("train")[0]
    assert row["camera"] == "A"
    assert row[column] == str(folder / "blue" / Path(row[column]).name)
    assert len(next(iter(data.train_dataloader()))["labels"]) == 8


def test_a_missing_column_names_near_misses(folder):
    (folder / "t.csv").write_text("images,label\na.png,x\n")
    with pytest.raises(DataError, match=r"but is 'image' instead\. Did you mean `images`"):
        ImageData(path=str(folder / "t.csv")).setup("fit")


def test_a_test_split_is_drawn_and_the_same_file_is_not_trained_on(folder):
    (folder / "blue" / "copy.png").write_bytes((folder / "blue" / "0.png").read_bytes())
    copies = set()
    for seed in range(6):
        data = ImageData(path=str(folder), test=0.3, validation=0.2, seed=seed)
        data.setup("fit")
        held = data.inputs("test") + data.inputs("validation")
        contents = {Path(name).read_bytes() for name in held}
        assert not any(Path(name).read_bytes() in contents for name in data.inputs("train"))
        copies.add(data.dropped)
    assert copies == {0, 1}


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("L", 51, (51, 51, 51)),
        ("RGBA", (10, 20, 30, 0), (10, 20, 30)),
        ("P", 0, (0, 0, 0)),
        ("I;16", 51 * 257, (51, 51, 51)),
        ("1", 1, (255, 255, 255)),
        ("LA", (51, 255), (51, 51, 51)),
    ],
)
def test_every_mode_becomes_rgb(folder, processor, mode, value, expected):
    for i in range(5):
        image = Image.new(mode, (6, 6), value)
        image.save(folder / "green" / f"{i}.png")
    data = ImageData(path={"predict": str(folder / "green")}).connect(processor)
    data.setup("predict")
    pixels = next(iter(data.predict_dataloader()))["pixel_values"]
    assert torch.allclose(pixels[0, :, 0, 0], torch.tensor(expected) / 127.5 - 1, atol=0.02)


def test_images_stand_as_viewers_show_them(folder, processor):
    image = Image.new("RGB", (6, 6))
    image.paste((255, 255, 255), (0, 0, 6, 3))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise, which brings it to the right
    image.save(folder / "turned.png", exif=exif)
    data = ImageData(path={"predict": str(folder / "turned.png")}).connect(processor)
    pixels = next(iter(data.predict_dataloader()))["pixel_values"][0]
    assert pixels[0, 3].tolist() == [-1, -1, -1, 1, 1, 1]


def test_broken_images_are_refused_or_counted(folder, processor):
    whole = paint(folder / "noise.png", (0, 0, 0), 0).read_bytes()
    (folder / "noise.png").unlink()
    (folder / "green" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "green" / "text.jpg").write_text("no image")
    message = r"the image `.*green/cut\.png` cannot be read: .*row 11 of `.*all`.*skip_bad_rows"
    with pytest.raises(DataError, match=message):
        ImageData(path=str(folder)).setup("fit")
    data = ImageData(path=str(folder), skip_bad_rows=True, validation=0.2).connect(processor)
    data.setup("fit")
    assert data.skipped == {"train": 2, "test": 0, "validation": 0}
    assert data.label_counts("train") == {"blue": 4, "green": 4}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_as_pillow_turns_them(tmp_path, orientation):
    image = Image.effect_noise((6, 4), 90)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as stored:
        expected = ImageOps.exif_transpose(stored).convert("RGB")
    found = open_image(tmp_path / "turned.png", upright=True)
    assert found.size == expected.size
    assert found.tobytes() == expected.tobytes()


def test_damaged_metadata_beside_the_orientation_spoil_no_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Canon"
    damaged = exif.tobytes().replace(b"\x0f\x01\x02\0", b"\x0a\x01\x02\0")  # a tag of numbers
    damaged = damaged.replace(b"\x01\x0f\0\x02", b"\x01\x0a\0\x02")
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", exif=damaged)
    with Image.open(tmp_path / "a.jpg") as stored, pytest.raises(Exception, match="argument"):
        ImageOps.exif_transpose(stored)
    with without_warnings():
        assert open_image(tmp_path / "a.jpg", upright=True).size == (4, 6)


def test_too_many_pixels_are_refused_without_a_warning(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 119)  # twice as many PIL refuses by itself
    with pytest.raises(
        DataError, match=r"blue/0\.png` is too large .* 120 pixels, but may have 119"
    ):
        ImageData(path=str(folder)).setup("fit")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 120)
    ImageData(path=str(folder)).setup("fit")


def test_a_path_that_cannot_be_one_is_told(folder):
    (folder / "t.csv").write_text(f"image\n{'a' * 5000}.png\n")
    with pytest.raises(DataError, match=r"cannot be read: .*File name too long.*row 1 of"):
        ImageData(path={"predict": str(folder / "t.csv")}).setup("predict")


def test_an_image_is_opened_without_a_change_of_the_filters_of_warnings(folder, monkeypatch):
    # They belong to the whole process: threads that exchange them leave wrong ones behind.
    inside, opening = [], Image.open
    monkeypatch.setattr(Image, "open", lambda x: inside.append(warnings.filters) or opening(x))
    with without_warnings():
        before = warnings.filters
        open_image(folder / "blue" / "0.png")
    assert inside[0] is before


def test_an_empty_folder_is_refused_or_left_out(folder):
    (folder / "red").mkdir()
    with pytest.raises(DataError, match=r"all/red` must hold images \(\.jpg.*but has none"):
        ImageData(path=str(folder)).setup("fit")
    data = ImageData(path=str(folder), skip_bad_rows=True)
    assert data.labels == ("blue", "green")
    assert data.skipped["train"] == 1


def test_a_folder_without_labels_says_what_is_needed(folder):
    message = r"must have a folder with images for each label, but has no folders instead"
    with pytest.raises(DataError, match=message):
        ImageData(path=str(folder / "blue")).setup("fit")


def test_what_systems_leave_is_passed_over(folder, capsys):
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / "blue" / "Thumbs.db").write_text("")
    (folder / "blue" / ".hidden.png").write_text("")
    (folder / "blue" / "notes.txt").write_text("")
    data = ImageData(path=str(folder))
    data.setup("fit")
    assert len(data.table("train")) == 10


def test_an_unknown_label_names_the_image(folder, tmp_path):
    test = paint(tmp_path / "test" / "gren" / "a.png", (0, 0, 0), 1).parents[1]
    data = ImageData(path={"train": str(folder), "test": str(test)})
    message = r"must be one of blue, green, but is 'gren' in row 1 .* Did you mean `green`.*a\.png"
    with pytest.raises(DataError, match=message):
        data.setup("fit")


def test_a_place_that_is_not_there_names_near_misses(folder):
    with pytest.raises(DataError, match=r"does not exist\. Did you mean `all`"):
        ImageData(path=str(folder.parent / "alll")).setup("fit")
    with pytest.raises(DataError, match=r"must be a folder of images, a table of paths"):
        ImageData(path=paint(folder / "a.png", (0, 0, 0), 0).as_posix()).setup("fit")


def test_the_processor_gives_the_size_and_a_setting_another(folder, processor):
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    cutting = BitImageProcessorPil(
        size={"shortest_edge": 8}, crop_size={"height": 6, "width": 6}, do_normalize=False
    )

    def pixels(tool, **settings):
        data = ImageData(path={"predict": str(folder)}, **settings).connect(tool)
        return next(iter(data.predict_dataloader()))["pixel_values"][0]

    assert pixels(processor).shape == (3, 6, 6)
    assert pixels(processor, size=9).shape == (3, 9, 9)
    assert pixels(cutting).shape == (3, 6, 6)
    assert pixels(cutting, size=12).shape == (3, 12, 12)
    # The odd first pixel is part of the whole image alone.
    spread = [pixels(cutting, size=9, whole=whole)[2].std() for whole in (False, True)]
    assert spread[0] < 1e-6 < spread[1]


def test_augmentation_changes_training_images_alone(folder, processor):
    draw = {"RandomHorizontalFlip": {"p": 1.0}}
    for i in range(5):  # the left half is white
        image = Image.new("RGB", (6, 6))
        image.paste((255, 255, 255), (0, 0, 3, 6))
        image.putpixel((0, 0), (i, 0, 0))
        image.save(folder / "green" / f"{i}.png")
    data = ImageData(path=str(folder), augmentation=draw).connect(processor)
    batch = next(iter(data.train_dataloader()))
    green = batch["pixel_values"][batch["labels"] == 1]
    assert torch.allclose(green[:, 0, 3], torch.tensor([-1.0, -1, -1, 1, 1, 1]), atol=1e-3)
    for loader in (data.val_dataloader(), unaugmented(data.train_dataloader())):
        batch = next(iter(loader))
        plain = batch["pixel_values"][batch["labels"] == 1]
        assert torch.allclose(plain[:, 0, 3], torch.tensor([1.0, 1, 1, -1, -1, -1]), atol=1e-3)
    again = pickle.loads(pickle.dumps(data.train_dataloader().dataset))
    assert len(again[0]["pixel_values"]) == 3


def test_augmentation_is_drawn_for_each_image_from_the_global_state(folder, processor):
    draw = {"RandomBrightness": {"brightness": [0.2, 0.8], "p": 1.0}}
    data = ImageData(path=str(folder), augmentation=draw).connect(processor)
    data.setup("fit")
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(next(iter(data.train_dataloader()))["pixel_values"])
    assert torch.equal(*found)
    assert len(set(np.round(found[0][:, :, 3, 3].amax(1).tolist(), 4))) > 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"RandomHorizontalFlop": {}}, r"has 'RandomHorizontalFlop'\. Did you mean `RandomHori"),
        ({"RandomMixUpV2": {}}, r"has 'RandomMixUpV2'"),
        ({"RandomAffine": {"angle": 3}}, r"`augmentation\.RandomAffine` cannot be made: .*angle"),
    ],
)
def test_wrong_augmentations_are_refused(folder, settings, message):
    with pytest.raises(ConfigError, match=message):
        ImageData(path=str(folder), augmentation=settings)


def test_a_data_set_of_images_reads_as_the_hub_gives_it(folder, processor, monkeypatch):
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as Feature

    from lightning_peft.data import image_origin

    features = Features({"image": Feature(), "label": ClassLabel(names=["sea", "leaf"])})
    files = [str(path) for path in sorted(folder.rglob("*.png"))]
    rows = Dataset.from_dict({"image": files, "label": [0] * 5 + [1] * 5}, features=features)
    monkeypatch.setattr(image_origin, "read_hub", lambda name, config: {"train": rows})
    data = ImageData(hub="some/images", validation=0.2).connect(processor)
    assert data.labels == ("sea", "leaf")
    assert data.label_counts("train") == {"sea": 4, "leaf": 4}
    assert next(iter(data.train_dataloader()))["pixel_values"].shape == (8, 3, 6, 6)


def test_settings_out_of_range_are_refused(folder):
    with pytest.raises(ConfigError, match="`size` must be at least 1 pixel, but is 0 instead"):
        ImageData(path=str(folder), size=0)
    with pytest.raises(ConfigError, match="`source` must be mnist, but is 'cifar' instead"):
        ImageData(source="cifar")
    with pytest.raises(ConfigError, match="`path` must be a folder or a file"):
        ImageData()
    with pytest.raises(ConfigError, match=r"has 'tset' instead\. Did you mean `test`"):
        ImageData(path={"tset": str(folder)})
