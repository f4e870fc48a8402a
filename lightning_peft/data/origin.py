"""Where the rows of a data module come from: files, the hub, or a package."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_peft.data.bad_rows import BadRows
from lightning_peft.data.chitchat import read_chitchat
from lightning_peft.data.conll2003 import read_conll2003
from lightning_peft.data.drug_reviews import read_drug_reviews
from lightning_peft.data.movielens import read_movielens
from lightning_peft.data.packaged import located
from lightning_peft.data.parallel import read_parallel
from lightning_peft.data.reviews import read_reviews
from lightning_peft.data.sources import matching, read_files, read_hub, stream_file, stream_hub
from lightning_peft.errors import ConfigError, DataError, near_misses

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "validation", "test", "predict")

SOURCES: dict[str, Callable[[], dict[str, "Dataset"]]] = {
    "reviews": read_reviews,
    "drug_reviews": read_drug_reviews,
    "chitchat": read_chitchat,
    "conll2003": read_conll2003,
    "movielens": read_movielens,
}
"""Data that packages carry in forms of their own, by the name that `source` gives: all splits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """The place of the rows: `path`, else `hub`, else the packaged `source`.

    Raises:
        ConfigError: None of them is given, or a name is unknown.
    """

    path: str | Mapping[str, str | Mapping[str, str] | None] | None = None
    """One file, for `predict` the one to judge and else the one to train on; or files by split.

    `package://<package>/<file>` is a file of an installed package; `parts/*.jsonl` are several, one
    after the other in the order of their names. A split may have several plain
    files by column, whose lines belong together; None leaves a split out.
    """
    hub: str | None = None
    """Name of a data set on the hub."""
    hub_config: str | None = None
    """Its configuration, where it has several."""
    source: str | None = None
    """Data that a package carries: `reviews`, `drug_reviews`, `chitchat`, `movielens`,
    `conll2003`."""
    format: str | None = None
    """Format of the files; None takes it from each name."""
    formats: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Formats by a name's extension, where the task reads others than `read_file` does."""
    columns: Sequence[str] | None = None
    """Names of the columns of files without a header line."""

    def __post_init__(self) -> None:
        if self.path is None and self.hub is None and self.source is None:
            raise ConfigError(
                f"`path` must be a file (or `hub` a data set, or `source` one of "
                f"{', '.join(SOURCES)}), but none of them is given."
            )
        if self.source is not None and self.source not in SOURCES:
            raise ConfigError(
                f"`source` must be one of {', '.join(SOURCES)}, but is {self.source!r} instead."
                f"{near_misses(self.source, SOURCES)}"
            )
        for name in self.files():
            if name not in SPLITS:
                raise ConfigError(
                    f"`path` must be given by split ({', '.join(SPLITS)}), but has {name!r} "
                    f"instead.{near_misses(name, SPLITS)}"
                )

    def files(self) -> dict[str, str | Mapping[str, str]]:
        """Return the files by split; those of parallel text by column."""
        if self.path is None:
            return {}
        if isinstance(self.path, str):
            return {"train": self.path, "predict": self.path}
        files = {split: file for split, file in self.path.items() if file is not None}
        return {"predict": files["test"]} | files if "test" in files else files

    def name(self, split: str) -> str:
        """Return what a person calls the place that the rows of a split come from."""
        if self.path is not None:
            files = self.files().get(split, self.path)
            names = [files] if isinstance(files, str) else filter(None, files.values())
            return " and ".join(f"`{name}`" for name in names)
        return f"`{self.hub or self.source}` ({split})"

    def prepare(self) -> None:
        """Download a data set of the hub."""
        if self.path is None and self.hub is not None:
            read_hub(self.hub, self.hub_config)

    def stream(self, split: str, bad: BadRows, size: int) -> Iterator["Dataset"]:
        """Read the rows of a split by blocks of at most `size`, as often as it is asked.

        Raises:
            DataError: As `read`, and where the rows can only be read as a whole.
        """
        files = self.files().get(split)
        if self.hub is not None and self.path is None:
            blocks = stream_hub(self.hub, self.hub_config, split, size)
        elif isinstance(files, str):
            kind = self.format or self.formats.get(Path(files).suffix.lower())
            paths = matching(located(files))
            blocks = _streamed(paths, kind, bad, size)
        else:
            raise DataError(
                f"`streaming` must be false for {self.name(split)}, which is read as a whole: "
                f"only files of JSON lines or Parquet and data sets of the hub can be streamed."
            )
        for rows in blocks:
            yield rows
            bad.begin(bad.before + len(rows) + len(bad.unreadable))

    def read(self, split: str, bad: BadRows) -> "Dataset | None":
        """Read the rows of a split; None where there is none.

        Raises:
            DataError: A file is missing or damaged, or a row is, unless `bad` leaves it out.
        """
        if self.path is not None:
            file = self.files().get(split)
            if file is None:
                return None
            if not isinstance(file, str):
                return read_parallel({k: located(name) for k, name in file.items()}, bad)
            kind = self.format or self.formats.get(Path(file).suffix.lower())
            return read_files(matching(located(file)), kind, self.columns, bad)
        name = "test" if split == "predict" else split
        if self.hub is not None:
            return read_hub(self.hub, self.hub_config).get(name)
        return SOURCES[str(self.source)]().get(name)


def _streamed(
    paths: Sequence[str], kind: str | None, bad: BadRows, size: int
) -> Iterator["Dataset"]:
    for path in paths:
        bad.begin_file(path)
        yield from stream_file(path, kind, bad, size)
