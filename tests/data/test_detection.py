import json
import pickle
from pathlib import Path

import pytest
import torch

from lightning_peft.data.detection import DetectionData
from lightning_peft.errors import ConfigError, DataError
from tests.pictures import annotation, draw, processor, write_coco, write_voc


@pytest.fixture
def voc(tmp_path) -> Path:
    return write_voc(tmp_path / "voc", {"train": 6, "val": 2, "test": 3})


@pytest.fixture
def coco(tmp_path) -> Path:
    return write_coco(tmp_path / "coco", 6)


def connected(path, **settings) -> DetectionData:
    return DetectionData(path=str(path), batch_size=2, **settings).connect(processor())


def first_batch(data: DetectionData, split: str = "test"):
    return next(iter(getattr(data, f"{split}_dataloader")()))


def test_the_lists_of_voc_tell_the_splits(voc):
    data = connected(voc)
    assert data.labels == ("blue", "red")
    names = [[Path(p).stem for p in data.inputs(s)] for s in ("train", "validation", "test")]
    assert [len(found) for found in names] == [6, 2, 3]
    assert names[1] == ["val_0", "val_1"]
    assert data.has_split("test")


def test_voc_without_lists_is_one_split(voc):
    for file in (voc / "ImageSets/Main").iterdir():
        file.unlink()
    data = connected(voc, validation=0.2)
    data.setup("fit")
    assert len(data.inputs("train")) + len(data.inputs("validation")) == 11


@pytest.mark.parametrize("names", [("annotations", "images"), ("", "")])
def test_voc_under_other_names_or_in_one_folder_is_found(voc, tmp_path, names):
    other = tmp_path / "other"
    for old, new in zip(("Annotations", "JPEGImages"), names, strict=True):
        (other / new).mkdir(parents=True, exist_ok=True)
        for file in (voc / old).iterdir():
            ending = ".PNG" if file.suffix == ".png" else file.suffix
            file.rename(other / new / f"{file.stem}{ending}")
    data = connected(other, validation=0.2)
    data.setup("fit")
    assert len(data.inputs("train")) + len(data.inputs("validation")) == 11
    assert len(data.inputs("predict")) == 11


def test_a_batch_has_pixels_and_boxes(voc):
    data = connected(voc)
    batch = first_batch(data)
    assert batch["pixel_values"].shape == (2, 3, 28, 42)
    assert batch["pixel_mask"].all()
    assert batch["row_sizes"].tolist() == [[64, 48], [64, 48]]
    target = data.targets("test")[0]
    assert [one["label"] for one in target] == ["blue", "red"]
    left, top, right, bottom = target[0]["box"]
    centre = [(left + right) / 128, (top + bottom) / 96, (right - left) / 64, (bottom - top) / 48]
    torch.testing.assert_close(batch["labels"][0]["boxes"][0], torch.tensor(centre))
    assert batch["labels"][0]["class_labels"].tolist() == [0, 1]
    pixels = batch["pixel_values"][0]
    x, y = int(centre[0] * 42), int(centre[1] * 28)
    assert pixels[2, y, x] > pixels[0, y, x]  # blue is where its box is


@pytest.mark.parametrize("kind", ["yolos", "rt_detr", "conditional_detr", "deformable_detr"])
def test_the_processors_of_detectors_can_be_used(voc, kind):
    from importlib import import_module

    module = import_module(f"transformers.models.{kind}.image_processing_pil_{kind}")
    name = next(n for n in vars(module) if n.endswith("ProcessorPil") and n != "ImageProcessorPil")
    data = DetectionData(path=str(voc), size={"height": 28, "width": 42}, batch_size=2)
    batch = first_batch(data.connect(getattr(module, name)()))
    assert batch["pixel_values"].shape == (2, 3, 28, 42)


def test_a_mirrored_image_has_mirrored_boxes(voc):
    plain, mirrored = (connected(voc, flip=flip) for flip in (0.0, 1.0))
    items = [data.items("train", data.chosen("train")) for data in (plain, mirrored)]
    one, other = items[0][0], items[1][0]
    assert torch.equal(one["pixels"].flip(-1), other["pixels"])
    assert one["view"] != other["view"]
    assert (64 - other["boxes"][:, [2, 0]]).tolist() == one["boxes"][:, [0, 2]].tolist()
    assert not mirrored.items("validation", mirrored.chosen("validation")).flip


def test_images_of_other_sizes_are_padded_and_masked(voc):
    draw(voc / "JPEGImages" / "test_1.png", 9, size=(64, 64))
    size = {"shortest_edge": 28, "longest_edge": 56}
    batch = first_batch(connected(voc, size=size))
    assert batch["pixel_values"].shape[2:] == (28, 37)
    assert batch["pixel_mask"].sum((1, 2)).tolist() == [28 * 37, 28 * 28]
    torch.testing.assert_close(batch["row_shares"], torch.tensor([[1, 1], [28 / 37, 1]]))
    assert (batch["pixel_values"][1, :, :, 28:] == 0).all()


def test_kept_images_are_the_same_and_read_once(voc):
    data, kept = connected(voc), connected(voc, keep=True)
    first, again = first_batch(kept), first_batch(kept)
    assert torch.equal(first["pixel_values"], first_batch(data)["pixel_values"])
    (voc / "JPEGImages/test_0.png").unlink()
    assert torch.equal(first["pixel_values"], first_batch(kept)["pixel_values"])
    assert torch.equal(first["pixel_values"], again["pixel_values"])


def test_coco_gives_the_same_as_voc(coco):
    data = connected(coco, validation=0.3)
    data.setup("fit")
    assert data.labels == ("blue", "red")
    row = data.rows("train")[0]
    assert row["labels"] == ["blue", "red"]
    content = json.loads(coco.read_text())
    name = Path(row["image"]).name
    key = next(one["id"] for one in content["images"] if one["file_name"] == name)
    x, y, w, h = next(a["bbox"] for a in content["annotations"] if a["image_id"] == key)
    assert row["boxes"][0] == [x, y, x + w, y + h]
    assert data.has_split("validation")
    assert not data.has_split("test")


def test_crowds_and_difficult_objects_are_not_trained_on(coco, voc):
    content = json.loads(coco.read_text())
    content["annotations"][0]["iscrowd"] = 1
    coco.write_text(json.dumps(content))
    file = voc / "Annotations/test_0.xml"
    objects = [("red", [1, 1, 9, 9]), ("blue", [20, 20, 30, 30])]
    file.write_text(annotation(objects, "<difficult>1</difficult>"))
    data = DetectionData(path={"train": str(coco), "test": str(voc)}, batch_size=3)
    data.connect(processor())
    batch = first_batch(data)
    assert len(batch["labels"][0]["boxes"]) == 0
    assert batch["row_objects"][0]["ignored"].all()
    ignored = [one["ignored"] for row in data.targets("train") for one in row]
    assert sum(ignored) <= 1


def test_an_image_without_objects_is_a_row(voc):
    (voc / "Annotations/test_0.xml").write_text(annotation([]))
    data = connected(voc)
    assert data.targets("test")[0] == []
    assert first_batch(data)["labels"][0]["boxes"].shape == (0, 4)


def test_what_is_predicted_needs_no_annotations(voc, coco, tmp_path):
    for place, count in ((voc, 3), (voc / "JPEGImages", 11), (coco, 6)):
        data = connected(place)
        data.connect(processor(), labels=("blue", "red"))
        assert len(data.inputs("predict")) == count
        batch = first_batch(data, "predict")
        assert not {"labels", "row_objects"} & set(batch)
    single = connected(voc / "JPEGImages/test_0.png")
    assert list(single.predict_rows()[0]) == ["image", "width", "height"]
    (voc / "Annotations/test_0.xml").unlink()
    assert len(connected(voc).inputs("predict")) == 3


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([30, 5, 20, 9], "must have its left and top before its right and bottom"),
        ([5, 5, 5, 9], "must have its left and top before its right and bottom"),
        ([5, 5, 99, 9], "must lie in the image of 64 × 48 pixels, but has"),
        (["a", 5, 7, 9], "must have numbers as corners"),
        (["nan", 5, 7, 9], "must have finite corners"),
    ],
)
def test_a_bad_box_is_told_with_its_object_or_left_out(voc, box, message):
    objects = [("red", [1, 1, 9, 9]), ("blue", box)]
    (voc / "Annotations/test_1.xml").write_text(annotation(objects))
    with pytest.raises(DataError, match=rf"object 2 \(blue\) of `.*test_1.xml`.* {message}"):
        connected(voc).setup("test")
    data = connected(voc, skip_bad_rows=True)
    assert len(data.inputs("test")) == 2
    assert data.skipped["test"] == 1


def test_a_box_that_reaches_over_by_a_pixel_is_cut(voc):
    (voc / "Annotations/test_1.xml").write_text(annotation([("red", [-1, 1, 65, 48.5])]))
    assert connected(voc).targets("test")[1][0]["box"] == [0, 1, 64, 48]


def test_an_unknown_class_is_told_with_near_misses(voc):
    (voc / "Annotations/test_1.xml").write_text(annotation([("rad", [1, 1, 9, 9])]))
    with pytest.raises(
        DataError, match=r"object 1 \(rad\) .* one of blue, red. Did you mean `red`"
    ):
        connected(voc).setup("test")


def test_missing_and_broken_images_are_told(voc):
    image = voc / "JPEGImages/test_0.png"
    image.write_bytes(image.read_bytes()[:90])
    with pytest.raises(DataError, match=r"the image `.*test_0.png` cannot be read"):
        connected(voc).setup("test")
    image.unlink()
    with pytest.raises(DataError, match=r"test_0.* does not exist"):
        connected(voc).setup("test")
    assert len(connected(voc, skip_bad_rows=True).inputs("test")) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<annotation>", "is damaged: no element found"),
        (
            '<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]><annotation>&c;</annotation>',
            "must be XML without a DTD",
        ),
        (
            "<annotation><object><name>red</name></object></annotation>",
            "object 1 of .* must have a name and a bndbox",
        ),
        (None, "must hold the objects of an image, but cannot be read"),
    ],
)
def test_a_bad_annotation_is_told(voc, content, message):
    file = voc / "Annotations/test_1.xml"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(DataError, match=message):
        connected(voc).setup("test")
    assert len(connected(voc, skip_bad_rows=True).inputs("test")) == 2


def test_a_name_that_is_listed_twice_is_told(voc):
    (voc / "ImageSets/Main/test.txt").write_text("test_0\ntest_0\n")
    with pytest.raises(DataError, match="names 'test_0' twice"):
        connected(voc).setup("test")


def test_lists_by_class_and_single_lists_can_be_read(voc):
    file = voc / "ImageSets/Main/red_test.txt"
    file.write_text("test_0  1\ntest_2 -1\n")
    data = DetectionData(path={"train": str(voc), "test": str(file)}).connect(processor())
    assert [Path(p).stem for p in data.inputs("test")] == ["test_0", "test_2"]


def test_annotations_may_have_a_namespace(voc):
    before = DetectionData(path=str(voc)).connect(processor()).targets("test")
    for file in (voc / "Annotations").iterdir():
        file.write_text(file.read_text().replace("<annotation>", '<annotation xmlns="urn:voc">'))
    assert DetectionData(path=str(voc)).connect(processor()).targets("test") == before


def test_names_with_spaces_stand_in_lists(voc):
    for old, new in (("train_0", "my photo 1"), ("train_1", "my photo")):
        for file in (f"JPEGImages/{old}.png", f"Annotations/{old}.xml"):
            (voc / file).rename((voc / file).with_stem(new))
    train = voc / "ImageSets/Main/train.txt"
    train.write_text(
        train.read_text().replace("train_0", "my photo 1").replace("train_1", "my photo")
    )
    data = DetectionData(path=str(voc)).connect(processor())
    assert {"my photo 1", "my photo"} <= {Path(p).stem for p in data.inputs("train")}


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("annotations", {"image_id": 99}, "annotation 1 .* must have the `image_id` of an image"),
        ("annotations", {"category_id": 1}, r"the `category_id` of a category \(7, 3\)"),
        ("annotations", {"bbox": [1, 2, 3]}, "must have a `bbox` of x, y, width and height"),
        ("annotations", {"bbox": [1, 2, -3, 4]}, "must have its left and top before"),
        (
            "annotations",
            {"bbox": [1, 2, 10**400, 4]},
            "must have a `bbox` of x, y, width and height",
        ),
        ("annotations", {"bbox": [1, 2, float("nan"), 4]}, "must have a `bbox` of x, y, width"),
        ("annotations", {"id": 2}, "annotation 2 .* must have an `id` of its own"),
        ("annotations", {"id": [1]}, r"must have a number or a text as `id`, but has \[1\]"),
        ("annotations", {"image_id": {"a": 1}}, "must have a number or a text as `image_id`"),
        ("annotations", {"category_id": []}, "must have a number or a text as `category_id`"),
        ("images", {"id": 11}, "entry 2 has 11, which another has too"),
        ("images", {"file_name": None}, "a text as `file_name`"),
        ("categories", {"name": ""}, "a text as `name`"),
    ],
)
def test_a_bad_coco_file_is_told(coco, part, change, message):
    content = json.loads(coco.read_text())
    content[part][0] |= change
    coco.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        connected(coco).setup("fit")


def test_an_image_with_a_bad_annotation_is_left_out_of_coco(coco):
    content = json.loads(coco.read_text())
    content["annotations"][0]["bbox"] = [1, 2]
    coco.write_text(json.dumps(content))
    data = connected(coco, skip_bad_rows=True, validation=0.2)
    data.setup("fit")
    assert len(data.inputs("train")) + len(data.inputs("validation")) == 5
    assert data.skipped["train"] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is damaged in line 1"), ("[1]", "must hold lists of images, annotations, categories")],
)
def test_a_file_that_is_not_coco_is_told(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=message):
        connected(tmp_path / "a.json").setup("fit")


def test_places_that_do_not_fit_are_told(voc, tmp_path):
    with pytest.raises(DataError, match=r"'.*vocs' does not exist\. Did you mean `voc`"):
        connected(tmp_path / "vocs").setup("fit")
    with pytest.raises(DataError, match="must be a VOC folder"):
        connected(voc / "JPEGImages").setup("fit")
    with pytest.raises(ConfigError, match="Did you mean `train`"):
        DetectionData(path={"trian": str(voc)})
    with pytest.raises(ConfigError, match="`flip` must be a probability"):
        DetectionData(path=str(voc), flip=2.0)
    with pytest.raises(ConfigError, match=r"`connect\(processor\)` must be called"):
        DetectionData(path=str(voc)).test_dataloader()


def test_items_survive_pickling(voc):
    data = connected(voc, flip=0.5)
    items = data.items("train", data.chosen("train"))
    assert pickle.loads(pickle.dumps(items))[0]["size"] == (64, 48)
