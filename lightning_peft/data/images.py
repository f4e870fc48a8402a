"""Images, read safely: what cannot be used is named."""

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning_peft.errors import DataError, near_misses, require

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
"""Endings of files that are taken for images, in lower case."""

_DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N")  # PIL's modes of more than 8 bits
_MOST = 65_535  # of 16 bits
# What PIL raises for damaged files and damaged metadata, by their many formats.
_DAMAGED = (OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, ArithmeticError)


def open_image(source: str | Path | bytes, name: str = "", upright: bool = False) -> "Image":
    """Read a whole image as RGB.

    Grey values of 16 bits become 8. Transparent pixels lose their transparency; of an animation the
    first picture is read.

    Args:
        source: Its file, or what one holds.
        name: What a person calls it; that of the file by default.
        upright: Turn it as its EXIF orientation says, as viewers show it.

    Raises:
        DataError: The file is missing, no image, damaged or suspiciously large.
        MissingExtraError: PIL is not installed.
    """
    pil = require("PIL.Image", "images")
    name = name or f"`{source!s}`"
    with _readable(name), pil.open(_file(source)) as image:
        _must_be_small(image, name)
        image.load()
        return _rgb(_turned(image) if upright else image, name)


def _file(source: str | Path | bytes) -> Any:
    """Return what PIL can open."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    path = Path(source)
    if not path.is_file():
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"the image `{path}` does not exist.{near_misses(path.name, near)}")
    return path


@contextmanager
def without_warnings() -> Iterator[None]:
    """Keep PIL from warning of odd metadata while images are opened.

    Warnings are filtered for the whole process: enter this around threads, never inside one.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn what PIL raises for damaged files into one sentence."""
    pil: Any = require("PIL.Image", "images")
    try:
        yield
    except DataError:  # said already
        raise
    except (*_DAMAGED, struct.error) as error:
        raise DataError(f"the image {name} cannot be read: {_said(error)}") from error
    except (pil.DecompressionBombError, pil.DecompressionBombWarning) as error:
        raise DataError(f"the image {name} is too large to be read safely: {error}") from error


def _must_be_small(image: "Image", name: str) -> None:
    """Refuse what PIL only warns of."""
    pil: Any = require("PIL.Image", "images")
    most, pixels = pil.MAX_IMAGE_PIXELS, image.width * image.height
    if most is not None and pixels > most:
        raise DataError(
            f"the image {name} is too large to be read safely: it has {pixels:,} pixels, but may "
            f"have {most:,}."
        )


def _said(error: Exception) -> str:
    # PIL ends this with the address of an object in memory.
    return "it is no image" if "cannot identify image file" in str(error) else str(error)


def _turned(image: "Image") -> "Image":
    """Return the image upright; of its metadata, nothing but the orientation is looked at."""
    from PIL.ExifTags import Base
    from PIL.Image import Transpose

    turns = (
        Transpose.FLIP_LEFT_RIGHT,
        Transpose.ROTATE_180,
        Transpose.FLIP_TOP_BOTTOM,
        Transpose.TRANSPOSE,
        Transpose.ROTATE_270,
        Transpose.TRANSVERSE,
        Transpose.ROTATE_90,
    )
    by_number: dict[Any, Transpose] = dict(enumerate(turns, 2))
    turn = by_number.get(image.getexif().get(Base.Orientation))
    return image if turn is None else image.transpose(turn)


def _rgb(image: "Image", name: str) -> "Image":
    if image.mode not in _DEEP:
        if image.mode == "F":
            raise DataError(f"the image {name} must have whole numbers, but has fractions instead.")
        return image.convert("RGB")
    lowest, highest = cast(tuple[int, int], image.getextrema())
    if lowest < 0 or highest > _MOST:
        raise DataError(
            f"the image {name} must have values from 0 to {_MOST:,}, but has {lowest:,} to "
            f"{highest:,} instead."
        )
    return image.convert("I").point(lambda value: value / 256).convert("L").convert("RGB")
