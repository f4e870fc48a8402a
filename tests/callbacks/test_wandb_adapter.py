"""An offline W&B run is read back from its file: configuration, metrics, artifact, no secret."""

import json
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningModule, Trainer

from lightning_peft.callbacks import AdapterStats, WandbAdapter, log_adapter
from lightning_peft.carrying.registry import adapters_of
from lightning_peft.loggers import MetricsFile, wandb_logger
from lightning_peft.redact import HIDDEN

pytestmark = pytest.mark.usefixtures("offline")

SECRET = "do-not-tell-4711"
CONFIG = {
    "method": {"lora": {"r": 2}},
    "logger": {"api_key": SECRET},
    "task": {"labels": ["a", "b"]},
}


def wandb_records(file: Path) -> Iterator[Any]:
    """Yield the protobuf records of a ``.wandb`` file: a LevelDB log of 32 kB blocks."""
    from wandb.proto.wandb_internal_pb2 import Record

    content = file.read_bytes()
    position, part = 7, b""
    while position < len(content):
        left = 32_768 - position % 32_768
        if left < 7:
            position += left
            continue
        _checksum, length, kind = struct.unpack_from("<IHB", content, position)
        part += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield Record.FromString(part)
            part = b""


class Run:
    """What an offline run left on disk."""

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
        self.ids = [file.stem for file in files]
        self.records = [record for file in files for record in wandb_records(file)]

    def kind(self, name: str) -> list[Any]:
        return [getattr(r, name) for r in self.records if r.WhichOneof("record_type") == name]

    def config(self) -> dict[str, Any]:
        updates = [u for record in self.kind("config") for u in record.update]
        return {u.key or ".".join(u.nested_key): json.loads(u.value_json) for u in updates}

    def summary(self) -> dict[str, Any]:
        updates = [u for record in self.kind("summary") for u in record.update]
        return {u.key or ".".join(u.nested_key): json.loads(u.value_json) for u in updates}

    def metric(self, name: str) -> list[float]:
        items = [i for record in self.kind("history") for i in record.item]
        return [json.loads(i.value_json) for i in items if (i.key or i.nested_key[0]) == name]


def _fit(
    module: LightningModule,
    batches: Any,
    trainer: Callable[..., Trainer],
    folder: Path,
    **more: Any,
) -> Trainer:
    logger = wandb_logger(folder, offline=True)
    made = trainer(
        callbacks=[AdapterStats(), WandbAdapter(CONFIG, **more)],
        enable_progress_bar=False,
        logger=logger,
    )
    made.fit(module, batches, batches)
    return made


def _finish(trainer: Trainer) -> None:
    import wandb

    trainer.logger.experiment.finish()  # type: ignore[union-attr]
    # `finish` returns before W&B's own process has written the last records.
    wandb.teardown()


def test_a_run_is_tracked_and_keeps_its_secrets(
    tuned: LightningModule,
    batches: Any,
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", f"logger.api_key={SECRET}"])
    trainer = _fit(tuned, batches, make_trainer, tmp_path)
    _finish(trainer)
    run = Run(tmp_path)

    assert run.config()["method"] == {"lora": {"r": 2}}
    assert run.config()["logger"] == {"api_key": HIDDEN}
    assert run.config()["task"] == {"labels": ["a", "b"]}
    assert run.summary()["adapter/parameters"] == 82
    assert run.summary()["adapter/bytes"] == 328
    assert len(run.metric("train/loss")) == len(run.metric("adapter/grad_norm")) == 8
    assert run.metric("lr") == pytest.approx([0.01] * 8)
    assert run.metric("val/accuracy")[-1] == float(trainer.callback_metrics["val/accuracy"])

    (artifact,) = run.kind("artifact")
    metadata = json.loads(artifact.metadata)
    assert (artifact.type, artifact.name) == ("adapter", f"default-{run.ids[0][4:]}")
    assert len(metadata["fingerprint"]["sha256"]) == 64
    assert metadata["parameters"] == 82
    assert {entry.path for entry in artifact.manifest.contents} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "lightning_peft.json",
    }
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file


def test_a_resumed_run_goes_on_under_the_same_id(
    tuned: LightningModule, batches: Any, make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    for _ in range(2):
        trainer = _fit(tuned, batches, make_trainer, tmp_path, artifact=False)
        _finish(trainer)
        # W&B names the folder of an offline run by the second.
        for found in tmp_path.glob("wandb/offline-run-2*"):
            found.rename(found.with_name(f"offline-run-{len(Run(tmp_path).ids)}"))
    run = Run(tmp_path)
    assert len(run.ids) == 2
    assert len(set(run.ids)) == 1
    assert not run.kind("artifact")


def test_an_exported_folder_is_logged_after_the_fit(
    tuned: LightningModule, batches: Any, make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    trainer = _fit(tuned, batches, make_trainer, tmp_path, artifact=False)
    folder = adapters_of(tuned)["default"].save(tmp_path / "adapter")
    log_adapter(trainer, folder)
    _finish(trainer)
    (artifact,) = Run(tmp_path).kind("artifact")
    config = json.loads((folder / "lightning_peft.json").read_text(encoding="utf-8"))
    assert json.loads(artifact.metadata)["fingerprint"] == config["fingerprint"]


def test_without_wandb_nothing_happens(
    tuned: LightningModule, batches: Any, make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    trainer = make_trainer(
        callbacks=[WandbAdapter(CONFIG)], enable_progress_bar=False, logger=MetricsFile(tmp_path)
    )
    trainer.fit(tuned, batches, batches)
    log_adapter(trainer, tmp_path / "absent")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]
