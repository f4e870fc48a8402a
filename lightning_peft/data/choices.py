"""The settings that all data modules share: which rows are used, and how batches are made."""

import dataclasses

from lightning_peft.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """Which rows are used, and for what.

    Raises:
        ConfigError: A number is out of its range.
    """

    validation: float = 0.1
    """Share of the training rows to hold out where there is no validation split."""
    test: float | None = None
    """Share of the training rows to hold out where there is no test split; None draws none."""
    seed: int = 0
    """Seed of all draws."""
    limit: int | None = None
    """At most so many rows of each split; for trials."""
    held_out: int | None = None
    """At most so many rows of validation and of test, which generate texts or are else slow."""
    shots: int | None = None
    """At most so many training rows of each label."""
    skip_bad_rows: bool = False
    """Leave rows out that cannot be used, and count them, instead of stopping at the first."""

    def __post_init__(self) -> None:
        _at_least_one(limit=self.limit, held_out=self.held_out, shots=self.shots)
        if self.test is not None and not 0 < self.test < 1 - self.validation:
            raise ConfigError(
                f"`test` must be a share that leaves rows beside `validation` ({self.validation}), "
                f"but is {self.test} instead."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loading:
    """How batches are made.

    Raises:
        ConfigError: A number is out of its range.
    """

    batch_size: int = 32
    """Rows in a batch."""
    num_workers: int = 0
    """Processes that load batches."""
    by_length: bool = False
    """Train on batches of like lengths, which have little padding."""
    streaming: bool = False
    """Leave the training rows where they are and read them block by block, again in each epoch."""

    def __post_init__(self) -> None:
        _at_least_one(batch_size=self.batch_size)
        if self.streaming and self.by_length:
            raise ConfigError("`by_length` must be false with `streaming`, but is true.")


def _at_least_one(**settings: int | None) -> None:
    for setting, value in settings.items():
        if value is not None and value < 1:
            raise ConfigError(f"`{setting}` must be at least 1, but is {value} instead.")
