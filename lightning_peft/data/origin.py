"""Where the rows of a data module come from: files, the hub, or a package."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_peft.data.bad_rows import BadRows
from lightning_peft.data.reviews import read_reviews
from lightning_peft.data.sources import read_file, read_hub
from lightning_peft.errors import ConfigError, near_misses

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "validation", "test", "predict")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """The place of the rows: `path`, else `hub`, else the packaged `source`.

    Raises:
        ConfigError: None of them is given, or a name is unknown.
    """

    path: str | Mapping[str, str] | None = None
    """One file, for `predict` the one to judge and else the one to train on; or files by split."""
    hub: str | None = None
    """Name of a data set on the hub."""
    hub_config: str | None = None
    """Its configuration, where it has several."""
    source: str | None = None
    """Data that a package carries: `reviews`."""
    format: str | None = None
    """Format of the files; None takes it from each name."""
    columns: Sequence[str] | None = None
    """Names of the columns of files without a header line."""

    def __post_init__(self) -> None:
        if self.path is None and self.hub is None and self.source is None:
            raise ConfigError(
                "`path` must be a file (or `hub` a data set, or `source` be reviews), but none "
                "of them is given."
            )
        if self.source not in (None, "reviews"):
            raise ConfigError(f"`source` must be reviews, but is {self.source!r} instead.")
        for name in self.files():
            if name not in SPLITS:
                raise ConfigError(
                    f"`path` must be given by split ({', '.join(SPLITS)}), but has {name!r} "
                    f"instead.{near_misses(name, SPLITS)}"
                )

    def files(self) -> dict[str, str]:
        """Return the files by split."""
        if self.path is None:
            return {}
        if isinstance(self.path, str):
            return {"train": self.path, "predict": self.path}
        files = dict(self.path)
        return {"predict": files["test"]} | files if "test" in files else files

    def name(self, split: str) -> str:
        """Return what a person calls the place that the rows of a split come from."""
        if self.path is not None:
            return f"`{self.files().get(split, self.path)}`"
        return f"`{self.hub}` ({split})" if self.hub is not None else f"the reviews ({split})"

    def prepare(self) -> None:
        """Download a data set of the hub."""
        if self.path is None and self.hub is not None:
            read_hub(self.hub, self.hub_config)

    def read(self, split: str, bad: BadRows) -> "Dataset | None":
        """Read the rows of a split; None where there is none.

        Raises:
            DataError: A file is missing or damaged, or a row is, unless `bad` leaves it out.
        """
        if self.path is not None:
            file = self.files().get(split)
            return None if file is None else read_file(file, self.format, self.columns, bad)
        name = "test" if split == "predict" else split
        tables = read_hub(self.hub, self.hub_config) if self.hub is not None else read_reviews()
        return tables.get(name)
