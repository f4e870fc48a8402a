"""Weights that a package holds in a form of its own, and how each becomes a transformers folder.

A module here names its `FILE` in the package's folder and has a function `convert(file, folder)`,
which writes `config.json`, `model.safetensors` and what else `from_pretrained` reads.
"""

import importlib
import json
import pkgutil
from functools import partial
from pathlib import Path
from typing import Protocol, cast

from lightning_peft.errors import ConfigError, near_misses
from lightning_peft.files.once import built_once


class Converter(Protocol):
    """What a module in this folder has."""

    FILE: str
    """Name of the file in the package's folder."""

    def convert(self, file: Path, folder: Path) -> None:
        """Write what `from_pretrained` reads into an empty folder.

        Raises:
            ConfigError: The file holds another model.
            MissingExtraError: A package that reads the file is not installed.
        """


def converter(name: str) -> Converter:
    """Return a converter by name.

    Raises:
        ConfigError: There is none of that name.
    """
    known = [module.name for module in pkgutil.iter_modules(__path__)]
    if name not in known:
        raise ConfigError(
            f"`converter` must be one of {', '.join(known)}, but is {name!r} instead."
            f"{near_misses(name, known)}"
        )
    return cast(Converter, importlib.import_module(f"{__name__}.{name}"))


def converted(name: str, file: Path, digest: str) -> Path:
    """Return a folder with the converted model, which is written once for each digest.

    Args:
        name: Of the converter.
        file: What it reads.
        digest: SHA-256 of the file.
    """
    return built_once(name, digest, partial(converter(name).convert, file))


def write_image_processor(folder: Path, kind: str, resample: int) -> None:
    """Write how images become what a network reads that was trained as usual on ImageNet.

    Args:
        folder: Where `preprocessor_config.json` goes.
        kind: Name of the image processor's class in transformers.
        resample: PIL's number of the interpolation.
    """
    settings = {
        "image_processor_type": kind,
        "do_resize": True,
        "size": {"shortest_edge": 256},
        "resample": resample,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "do_convert_rgb": True,
    }
    text = json.dumps(settings, indent=2)
    (folder / "preprocessor_config.json").write_text(f"{text}\n", encoding="utf-8")
