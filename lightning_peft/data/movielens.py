"""MovieLens 100k: who liked which film, by the region of the viewer; ten regional markets.

From F. M. Harper and J. A. Konstan, The MovieLens Datasets (ACM TiiS 2015): 100,000 ratings of
1,682 films by 943 viewers, as the package `recbole` carries them. A rating of 4 or 5 counts as
liked. The market is the first digit of the viewer's ZIP code, a region of the United States.
"""

import csv
import functools
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_peft.data.packaged import package_file

if TYPE_CHECKING:
    from datasets import Dataset

_REQUIREMENT = "recbole==1.2.1"
_FOLDER = "dataset_example/ml-100k"
_FILES = {
    "inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    "user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
}
_TEST = 0.2
_LIKED = 4.0  # of 5
_TERMS = (
    "MovieLens 100k: for research, not for commercial use without GroupLens' permission, not to be "
    "passed on separately; cite Harper and Konstan (2015)."
)

REGIONS = {
    "0": "New-England",
    "1": "New-York",
    "2": "Capital",
    "3": "South-East",
    "4": "Lakes",
    "5": "North",
    "6": "Prairie",
    "7": "South",
    "8": "Mountain",
    "9": "Pacific",
}
"""What a person calls the region of a ZIP code's first digit."""


@functools.cache
def read_movielens() -> dict[str, "Dataset"]:
    """Return the splits train (about 79,000 rows) and test (20,000): text, label and market.

    Each pair of a viewer and a film stands once, so that no rating is in both splits; viewers
    outside of the ten regions (abroad, mostly in Canada) are left out. The draw is always the same.

    Raises:
        DataError: The package is not installed.
        ConfigError: A file has another digest.
    """
    from datasets import Dataset

    rank_zero_info(_TERMS)
    films = {row["item_id"]: _film(row) for row in _rows("item")}
    viewers = {row["user_id"]: row for row in _rows("user")}
    ratings = [row for row in _rows("inter") if viewers[row["user_id"]]["zip_code"][0] in REGIONS]
    order = torch.randperm(len(ratings), generator=torch.Generator().manual_seed(0)).tolist()
    held_out = set(order[: round(_TEST * len(ratings))])
    splits: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    for i, rating in enumerate(ratings):
        viewer, film = viewers[rating["user_id"]], films[rating["item_id"]]
        splits["test" if i in held_out else "train"].append(_row(rating, viewer, film))
    return {split: Dataset.from_list(rows) for split, rows in splits.items()}


def _row(rating: dict[str, str], viewer: dict[str, str], film: str) -> dict[str, str]:
    kind = {"M": "man", "F": "woman"}[viewer["gender"]]
    return {
        "text": f"{film} Viewer: {kind}, {viewer['age']}, {viewer['occupation']}.",
        "label": "like" if float(rating["rating"]) >= _LIKED else "dislike",
        "market": REGIONS[viewer["zip_code"][0]],
        "user": rating["user_id"],
        "item": rating["item_id"],
    }


def _film(row: dict[str, str]) -> str:
    return f"{row['movie_title']} ({row['release_year']}): {', '.join(row['class'].split())}."


def _rows(kind: str) -> list[dict[str, str]]:
    """Return the rows of a file; a column is called `name:type` there."""
    path: Path = package_file("recbole", f"{_FOLDER}/ml-100k.{kind}", _REQUIREMENT, _FILES[kind])
    lines = path.read_text(encoding="utf-8").splitlines()
    header, *rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    names = [name.partition(":")[0] for name in header]
    return [dict(zip(names, row, strict=True)) for row in rows]
