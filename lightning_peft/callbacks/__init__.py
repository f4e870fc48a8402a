"""Callbacks that show, measure and track a fine-tuning run."""

from lightning_peft.callbacks.adapter_stats import AdapterStats
from lightning_peft.callbacks.frozen_features import FrozenFeatures
from lightning_peft.callbacks.progress import EpochLines, progress_bar
from lightning_peft.callbacks.summary import TrainingSummary
from lightning_peft.callbacks.wandb_adapter import WandbAdapter, log_adapter

__all__ = [
    "AdapterStats",
    "EpochLines",
    "FrozenFeatures",
    "TrainingSummary",
    "WandbAdapter",
    "log_adapter",
    "progress_bar",
]
