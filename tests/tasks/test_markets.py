"""One task in several markets: own adapters on one base, which nothing touches."""

import csv
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_peft import LoRA, PEFTModule, load_adapter, methods, switch
from lightning_peft.carrying.group import AdapterGroup
from lightning_peft.data.markets import MarketData
from lightning_peft.errors import AdapterError, CheckpointError, ConfigError, DataError
from lightning_peft.models import ModelSource
from lightning_peft.tasks.markets import Markets, OfMarket
from lightning_peft.tasks.sequence_classification import SequenceClassification
from tests.jobs.command import BAD, GOOD, OTHER
from tests.jobs.conftest import tiny_model  # noqa: F401  # a fixture

ROWS = {
    "_target_": "lightning_peft.data.classification.ClassificationData",
    "batch_size": 8,
    "max_length": 8,
}


def write(path: Path, rows: int, labelled: bool = True) -> Path:
    """Write rows whose word is good in one market and bad in the other."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "market"])
        for i in range(rows):
            good, market = i % 2 == 0, "north" if i % 4 < 2 else "far south"
            word = (GOOD if good else BAD)[i // 4 % 5]
            label = "yes" if good == (market == "north") else "no"
            writer.writerow([f"{word} {OTHER[i % 5]} {i}", label if labelled else "", market])
    return path


@pytest.fixture
def source(tiny_model: Path) -> ModelSource:  # noqa: F811
    return ModelSource(name=str(tiny_model))


@pytest.fixture
def data(tmp_path: Path, source: ModelSource) -> MarketData:
    files = {"train": write(tmp_path / "train.csv", 64), "test": write(tmp_path / "test.csv", 20)}
    return MarketData(path={split: str(path) for split, path in files.items()}, rows=ROWS)


def build(
    source: ModelSource, data: MarketData, shared: bool = False, method: object = None
) -> PEFTModule:
    torch.manual_seed(0)
    task = Markets(SequenceClassification(), shared=shared)
    task.equip(data, source)
    module = PEFTModule(source, method or LoRA(r=4), task.connect(data), lr=0.02)
    task.check(module.model, data)
    return module


def fit(
    module: PEFTModule,
    data: MarketData,
    folder: Path,
    epochs: int,
    callbacks: list[Callback] | None = None,
    **fit: object,
) -> Trainer:
    torch.manual_seed(1)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        enable_checkpointing=bool(callbacks),
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data, **fit)
    return trainer


def base_of(module: PEFTModule) -> dict[str, torch.Tensor]:
    state = module.model.state_dict()
    return {name: t.clone() for name, t in state.items() if "peft" not in name}


def test_markets_that_contradict_each_other_need_adapters_of_their_own(
    source: ModelSource, data: MarketData, tmp_path: Path
) -> None:
    module = build(source, data)
    before = base_of(module)
    trainer = fit(module, data, tmp_path, epochs=16)
    (own,) = trainer.test(module, datamodule=data, verbose=False)
    assert own["test/accuracy_north"] > 0.8
    assert own["test/accuracy_far south"] > 0.8
    for name, tensor in base_of(module).items():  # the heads of the model itself, too
        assert torch.equal(tensor, before[name]), name

    shared = build(source, data, shared=True)
    trainer = fit(shared, data, tmp_path, epochs=16)
    (one,) = trainer.test(shared, datamodule=data, verbose=False)
    assert one["test/accuracy"] < 0.8  # the text does not tell the market
    assert module.trained.num_parameters == 2 * shared.trained.num_parameters


def test_each_adapter_is_a_folder_that_loads_alone(
    source: ModelSource, data: MarketData, tmp_path: Path
) -> None:
    module = build(source, data)
    trainer = fit(module, data, tmp_path, epochs=1)
    folder = module.trained.save(tmp_path / "adapter")
    assert sorted(path.name for path in folder.iterdir()) == ["far-south", "north"]

    data.setup("test")
    batches = trainer.predict(module, data.test_dataloader())
    rows = [row for batch in batches for row in batch]
    assert [row["adapter"] for row in rows[:4]] == ["north", "north", "far-south", "far-south"]
    torch.manual_seed(0)
    plain = source.load("AutoModelForSequenceClassification", num_labels=2).eval()
    for name in ("north", "far-south"):
        adapter = load_adapter(plain, folder / name)
        switch(plain, adapter.name)
        (batch,) = [b for i, b in enumerate(data.test_dataloader()) if i == 0]
        inputs = {n: t for n, t in batch.items() if n not in ("labels", "row_market")}
        with torch.no_grad():
            scores = plain(**inputs).logits.softmax(-1)
        for row, score in zip(rows, scores, strict=False):
            if row["adapter"] == name:
                assert list(row["probabilities"].values()) == pytest.approx(
                    score.tolist(), abs=1e-5
                )


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_run_is_the_uninterrupted_one(
    source: ModelSource, data: MarketData, tmp_path: Path
) -> None:
    whole = build(source, data)
    keep = ModelCheckpoint(tmp_path / "kept", filename="{epoch}", save_top_k=-1)
    fit(whole, data, tmp_path, epochs=2, callbacks=[keep])
    first = tmp_path / "kept" / "epoch=0.ckpt"
    assert first.stat().st_size < 400_000  # no copy of the base

    resumed = build(source, data)
    fit(resumed, data, tmp_path, epochs=2, ckpt_path=first)
    for name, tensor in whole.trained.state_dict().items():
        assert torch.equal(tensor, resumed.trained.state_dict()[name]), name

    loaded = PEFTModule.load_from_checkpoint(tmp_path / "kept" / "epoch=1.ckpt")
    assert isinstance(loaded.trained, AdapterGroup)
    for name, tensor in whole.trained.state_dict().items():
        assert torch.equal(tensor, loaded.trained.state_dict()[name]), name
    with pytest.raises(CheckpointError):
        fit(build(source, data, shared=True), data, tmp_path, epochs=2, ckpt_path=first)


def test_trained_adapters_are_fused(source: ModelSource, data: MarketData, tmp_path: Path) -> None:
    module = build(source, data, method=methods.BottleneckAdapter(size=4))
    fit(module, data, tmp_path, epochs=1)
    folder = module.trained.save(tmp_path / "adapter")
    beside = {name: str(folder / name) for name in ("north", "far-south")}
    shared = Markets(SequenceClassification(), shared=True)
    shared.equip(data, source)
    fusion = PEFTModule(
        source, methods.AdapterFusion(), shared.connect(data), lr=0.01, beside=beside
    )
    trainer = fit(fusion, data, tmp_path, epochs=1)
    assert trainer.callback_metrics["val/accuracy"] >= 0
    assert "depends_on_north" in " ".join(fusion.adapter.state_dict())


@pytest.mark.parametrize("in_turn", [False, True])
def test_adapters_without_rows_in_a_batch_stay_as_they_are(
    source: ModelSource, data: MarketData, in_turn: bool
) -> None:
    data.in_turn = in_turn
    module = build(source, data)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    module.task.step(module.model, batch).loss.backward()
    present = set(module.task._adapters_of(batch))
    assert len(present) == (1 if in_turn else 2)
    for name, adapter in module.trained.adapters.items():
        assert any(p.grad is not None for p in adapter.parameters()) == (name in present)


def test_a_metric_of_a_market_without_rows_is_not_a_number() -> None:
    from torchmetrics.classification import BinaryAccuracy

    metrics = [OfMarket(BinaryAccuracy(), market) for market in (None, 0, 1)]
    for metric in metrics:
        metric.update((torch.tensor([1, 0]), torch.tensor([0, 0])), torch.tensor([1, 1]))
    whole, first, second = (metric.compute() for metric in metrics)
    assert whole == first == 0.5
    assert second.isnan()
    metrics[0].reset()
    metrics[0].update((torch.tensor([1]), torch.tensor([0])), torch.tensor([1]))
    assert metrics[0].compute() == 1


def test_what_does_not_fit_is_refused(source: ModelSource, data: MarketData) -> None:
    with pytest.raises(ConfigError, match="cannot train several adapters side by side"):
        build(source, data, method=methods.AdaLoRA())
    with pytest.raises(ConfigError, match="names that differ in their letters"):
        Markets(SequenceClassification(), markets=["a b", "a.b"])
    with pytest.raises(ConfigError, match="must be of several markets, but is ClassificationData"):
        Markets(SequenceClassification()).connect(data.rows)
    module = build(source, data)
    with pytest.raises(AdapterError, match=r"`module\.adapter` takes one adapter, but the run"):
        _ = module.adapter
    with pytest.raises(DataError, match="must say the market of each row in `row_market`"):
        module.task.step(module.model, {"input_ids": torch.ones(2, 3).long()})
