"""Several data sets at once, each for a task and an adapter of its own."""

from collections.abc import Mapping

import lightning.pytorch as pl
from lightning.pytorch.utilities import CombinedLoader

from lightning_peft.data.rows import RowData
from lightning_peft.errors import ConfigError


class SeveralData(pl.LightningDataModule):
    """A data module for each of several tasks; a step gets a batch of each, by the task's name.

    An epoch ends with the longest of them, the others begin anew meanwhile. Held-out rows are read
    once: a batch lacks the tasks that have no rows left.

    Args:
        of: The data modules by the name of their task.

    Raises:
        ConfigError: There are none.
    """

    def __init__(self, of: Mapping[str, RowData]) -> None:
        super().__init__()
        if not of or not all(isinstance(data, RowData) for data in of.values()):
            raise ConfigError(f"`data.of` must hold data modules by name, but holds {dict(of)}.")
        self.of = dict(of)

    def prepare_data(self) -> None:
        """Download data sets of the hub."""
        for data in self.of.values():
            data.prepare_data()

    def setup(self, stage: str) -> None:
        """Read, check and split what the stage needs.

        Raises:
            DataError: A file, a column or a row is not as it must be.
        """
        for data in self.of.values():
            data.setup(stage)

    def has_split(self, split: str) -> bool:
        """Whether each task has rows for `split`: train, validation, test or predict."""
        return all(data.has_split(split) for data in self.of.values())

    def train_dataloader(self) -> CombinedLoader:
        loaders = {name: data.train_dataloader() for name, data in self.of.items()}
        return CombinedLoader(loaders, "max_size_cycle")

    def val_dataloader(self) -> CombinedLoader:
        loaders = {name: data.val_dataloader() for name, data in self.of.items()}
        return CombinedLoader(loaders, "max_size")

    def test_dataloader(self) -> CombinedLoader:
        loaders = {name: data.test_dataloader() for name, data in self.of.items()}
        return CombinedLoader(loaders, "max_size")
