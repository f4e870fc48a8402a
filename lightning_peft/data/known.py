"""What places, checks and data modules can be asked, as protocols."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from lightning_peft.data.bad_rows import BadRows

if TYPE_CHECKING:
    from datasets import Dataset


class Place(Protocol):
    """Where rows come from; `Origin` for most tasks."""

    def name(self, split: str) -> str:
        """Return what a person calls the place that the rows of a split come from."""

    def prepare(self) -> None:
        """Download what is not on this machine."""

    def read(self, split: str, bad: BadRows) -> "Dataset | None":
        """Read the rows of a split; None where there is none.

        Raises:
            DataError: A file is missing or damaged, or a row is, unless `bad` leaves it out.
        """


class RowCheck(Protocol):
    """What a row must have besides what its task asks for."""

    def columns(self, split: str, rows: "Dataset") -> dict[str, str | None]:
        """Return the columns that rows must have, by the setting that names each."""

    def problems(self, split: str, rows: "Dataset", number: Callable[[int], int]) -> dict[int, str]:
        """Return what is wrong with rows, by their index; see `RowData.problems`."""


@runtime_checkable
class KnownSplits(Protocol):
    """A data module that knows which splits it has."""

    def has_split(self, split: str) -> bool:
        """Whether there are rows for `split`: train, validation, test or predict."""


@runtime_checkable
class KnownRows(KnownSplits, Protocol):
    """A data module that knows its rows one by one."""

    def inputs(self, split: str) -> list[Any]:
        """Return what the model reads of each row of a split, as a person knows it."""

    def targets(self, split: str) -> list[Any]:
        """Return what is right for each row of a split."""

    def predict_rows(self) -> list[dict[str, Any]]:
        """Return the rows to predict as they were read, in the order of the predictions."""
