"""Image files, read safely: what cannot be used is named."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_peft.errors import DataError, near_misses, require

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
"""Endings of files that are taken for images, in lower case."""


def open_image(path: str | Path) -> "Image":
    """Read a whole image as RGB.

    Transparent pixels lose their transparency; of an animation the first picture is read.

    Args:
        path: Its file.

    Raises:
        DataError: The file is missing, no image, damaged or suspiciously large.
        MissingExtraError: PIL is not installed.
    """
    pil = require("PIL.Image", "images")
    path = Path(path)
    if not path.is_file():
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"the image `{path}` does not exist.{near_misses(path.name, near)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pil.DecompressionBombWarning)
            with pil.open(path) as image:
                return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise DataError(f"the image `{path}` cannot be read: {error}") from error
    except (pil.DecompressionBombError, pil.DecompressionBombWarning) as error:
        raise DataError(f"the image `{path}` is too large to be read safely: {error}") from error
