import json
from itertools import chain

import datasets
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_peft.data import rows, streams
from lightning_peft.data.classification import ClassificationData
from lightning_peft.errors import ConfigError, DataError
from tests.data import numbered


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(rows, "BLOCK", 16)
    monkeypatch.setattr(streams, "_STEP", 5)


def flat(batches) -> list[int]:
    return list(chain.from_iterable(batches))


class Recorder(LightningModule):
    """Notes which rows it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[int]] = []

    def training_step(self, batch, index):
        self.seen += numbered.read([batch])
        return self.weight.sum()

    def validation_step(self, batch, index):
        raise AssertionError("nothing is validated here")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Save(Callback):
    """Keeps a checkpoint of a step: of the epoch's end where that is the 34th and last."""

    def __init__(self, folder, step) -> None:
        self.file, self.step = folder / f"{step}.ckpt", step

    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.global_step == self.step != 34:
            trainer.save_checkpoint(self.file)

    def on_train_epoch_end(self, trainer, *args) -> None:
        if trainer.global_step == self.step == 34:
            trainer.save_checkpoint(self.file)


def fit(data, steps, checkpoint=None, callbacks=(), **settings):
    module = Recorder()
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=[*callbacks],
        limit_val_batches=0, **settings,
    )  # fmt: skip
    trainer.fit(module, train_dataloaders=None, datamodule=data, ckpt_path=checkpoint)
    return module.seen


def test_every_row_comes_once_an_epoch_in_an_order_by_seed(tmp_path):
    data = numbered.data(tmp_path, streaming=True)
    first = numbered.read(data.train_dataloader())
    assert sorted(flat(first)) == list(range(100))
    assert flat(first) != list(range(100))
    assert {row // 16 for row in flat(first)[:16]} == {0}
    assert numbered.read(numbered.data(tmp_path, streaming=True).train_dataloader()) == first
    other = numbered.read(numbered.data(tmp_path, streaming=True, seed=1).train_dataloader())
    assert sorted(flat(other)) == list(range(100))
    assert other != first


def test_workers_share_the_blocks(tmp_path):
    data = numbered.data(tmp_path, streaming=True, num_workers=2)
    assert sorted(flat(numbered.read(data.train_dataloader()))) == list(range(100))


@pytest.mark.filterwarnings("ignore:The '.*' does not have many workers")
def test_a_fit_goes_on_where_it_was_interrupted(tmp_path):
    whole = fit(numbered.data(tmp_path, streaming=True), 50)
    assert sorted(flat(whole[:34])) == list(range(100))
    assert whole[34:50] != whole[:16]
    for stop in (20, 34, 40):
        fit(numbered.data(tmp_path, streaming=True), stop + 2, callbacks=[Save(tmp_path, stop)])
        file = tmp_path / f"{stop}.ckpt"
        resumed = fit(numbered.data(tmp_path, streaming=True), 50, file)
        assert whole[:stop] + resumed == whole


def test_parquet_and_several_files_are_streamed(tmp_path):
    for i, part in enumerate((range(60), range(60, 100))):
        table = datasets.Dataset.from_json(numbered.write(tmp_path / f"{i}.jsonl", part))
        table.to_parquet(tmp_path / f"part{i}.parquet")
    path = {"train": str(tmp_path / "part*.parquet"), "validation": str(tmp_path / "1.jsonl")}
    data = numbered.data(tmp_path, path=path, streaming=True)
    # Rows that are held out too are left out.
    assert sorted(flat(numbered.read(data.train_dataloader()))) == list(range(60))


def test_a_data_set_of_the_hub_is_streamed(tmp_path, monkeypatch):
    table = datasets.Dataset.from_json(numbered.write(tmp_path / "hub.jsonl", range(40)))
    held_out = datasets.Dataset.from_json(numbered.write(tmp_path / "val.jsonl", range(40, 50)))

    def load(name, config, split=None, streaming=False):
        assert name == "some/set"
        return table.to_iterable_dataset() if streaming else {"validation": held_out}

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("lightning_peft.data.origin.read_hub", load)
    data = ClassificationData(hub="some/set", streaming=True, labels=["a", "b"], max_length=8)
    data.connect(numbered.tokenizer(tmp_path))
    assert sorted(flat(numbered.read(data.train_dataloader()))) == list(range(40))


def test_bad_rows_are_named_or_left_out(tmp_path):
    file = tmp_path / "bad.jsonl"
    numbered.write(file, range(100))
    bad = "{ damaged\n" + json.dumps({"text": " ", "label": "a"}) + "\n"
    file.write_text(file.read_text() + bad)
    path = {"train": str(file), "validation": numbered.write(tmp_path / "v.jsonl", range(100, 110))}
    loader = numbered.data(tmp_path, path=path, streaming=True).train_dataloader()
    with pytest.raises(DataError, match=r"bad\.jsonl` is damaged in line 101"):
        numbered.read(loader)
    data = numbered.data(tmp_path, path=path, streaming=True, skip_bad_rows=True)
    assert sorted(flat(numbered.read(data.train_dataloader()))) == list(range(100))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"by_length": True}, "`by_length` must be false with `streaming`"),
        ({"shots": 2}, "`shots` must be left out with `streaming`"),
        ({"limit": 2}, "`limit` must be left out with `streaming`"),
        ({"labels": None}, "`streaming` leaves the training rows where they are.*`data.labels`"),
        ({"source": "reviews", "path": None}, "`streaming` must be false with `source`"),
        ({"path": {"train": "train.csv", "validation": "v.jsonl"}}, "must be false for csv"),
        ({"path": {"train": "train.jsonl"}}, "`path` must give rows for validation"),
    ],
)
def test_what_needs_all_rows_is_refused(tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    numbered.write(tmp_path / "v.jsonl", range(4))
    (tmp_path / "train.csv").write_text("text,label\nw1,a\n")

    def use() -> None:
        data = numbered.data(tmp_path, **settings, streaming=True)
        data.train_dataloader()
        assert data.labels

    with pytest.raises((ConfigError, DataError), match=message):
        use()


def test_a_list_of_objects_is_not_streamed(tmp_path):
    data = numbered.data(tmp_path, streaming=True)
    (tmp_path / "train.jsonl").write_text('[\n{"text": "w0", "label": "a"}]')
    with pytest.raises(
        DataError, match=r"`streaming` must be false for a list of objects.*JSON li"
    ):
        list(data.train_dataloader())


def test_a_fit_without_an_end_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"`trainer\.max_steps` must be given"):
        fit(numbered.data(tmp_path, streaming=True), -1, max_epochs=1)


def test_several_files_are_read_in_the_order_of_their_names(tmp_path):
    for name, part in (("b", range(3)), ("a", range(3, 5))):
        numbered.write(tmp_path / f"{name}.jsonl", part)
    data = ClassificationData(path=str(tmp_path / "*.jsonl"), labels=["a", "b"])
    assert data.table("train")["text"][:] == ["w3", "w4", "w0", "w1", "w2"]
    (tmp_path / "a.jsonl").write_text('{"text": "w3", "label": "a"}\n[]\n')
    (tmp_path / "c.jsonl").write_text('{"text": "w9", "label": "zz"}\n')
    skipping = {"path": str(tmp_path / "*.jsonl"), "labels": ["a", "b"], "skip_bad_rows": True}
    data = ClassificationData(**skipping)
    assert len(data.table("train")) == 4
    assert data.skipped["train"] == 2
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "w\xff"}\n{"text": "w1", "label": "b"}\n')
    data = ClassificationData(**skipping)
    assert data.table("train")["text"][:] == ["w3", "w1"]
    assert data.skipped["train"] == 3
    numbered.write(tmp_path / "b.jsonl", range(3))
    (tmp_path / "a.jsonl").write_text('{"text": "w3", "label": "a"}\n')
    with pytest.raises(DataError, match=r"but is 'zz' in row 5 of `.*\*\.jsonl`"):
        ClassificationData(**{**skipping, "skip_bad_rows": False}).table("train")
    (tmp_path / "c.jsonl").write_text('{"body": "w9", "label": "a"}\n')
    with pytest.raises(DataError, match=r"c\.jsonl` must have the columns of `.*a\.jsonl`"):
        ClassificationData(**skipping).table("train")
    with pytest.raises(DataError, match=r"must match at least one file"):
        ClassificationData(path=str(tmp_path / "*.nothing")).table("train")
