"""A job is what one command does."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from omegaconf import DictConfig


@dataclass(frozen=True, kw_only=True)
class Job(ABC):
    """Settings of one job; its values stand under `job` in the configuration."""

    @abstractmethod
    def run(self, config: DictConfig) -> None:
        """Do the job.

        Args:
            config: The whole composed configuration, read-only and not yet resolved.
        """
