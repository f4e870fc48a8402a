"""Several tasks on one base: texts are judged and words are tagged, by adapters in one run."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_peft import LoRA, PEFTModule, load_adapter
from lightning_peft.data.classification import ClassificationData
from lightning_peft.data.entities import EntityData
from lightning_peft.data.several import SeveralData
from lightning_peft.errors import ConfigError
from lightning_peft.models import ModelSource
from lightning_peft.tasks.named_entities import NamedEntities
from lightning_peft.tasks.sequence_classification import SequenceClassification
from lightning_peft.tasks.several import SeveralTasks
from tests.jobs.command import write_rows
from tests.jobs.conftest import tiny_model  # noqa: F401  # a fixture
from tests.jobs.test_ner import write_conll


@pytest.fixture
def source(tiny_model: Path) -> ModelSource:  # noqa: F811
    return ModelSource(name=str(tiny_model))


@pytest.fixture
def data(tmp_path: Path) -> SeveralData:
    texts, words = write_rows(tmp_path / "a.csv", 40, 0), write_conll(tmp_path / "b.conll", 64, 0)
    settings = {"batch_size": 8, "max_length": 16, "validation": 0.2}
    judged = ClassificationData(path=str(texts), **settings)
    return SeveralData({"judge": judged, "tag": EntityData(path=str(words), **settings)})


def build(source: ModelSource, data: SeveralData) -> PEFTModule:
    torch.manual_seed(0)
    task = SeveralTasks({"judge": SequenceClassification(), "tag": NamedEntities()})
    task.equip(data, source)
    module = PEFTModule(source, LoRA(r=4), task.connect(data), lr=0.005)
    task.check(module.model, data)
    return module


def test_tasks_with_heads_of_their_own_share_a_base(
    source: ModelSource, data: SeveralData, tmp_path: Path
) -> None:
    module = build(source, data)
    judge, tag = module.model["judge"], module.model["tag"]
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert judge.get_parameter(name) is tag.get_parameter(name)
    before = judge.get_parameter(name).clone()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=15,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(tmp_path / "kept")],
    )
    torch.manual_seed(1)
    trainer.fit(module, datamodule=data)
    assert trainer.callback_metrics["val/accuracy_judge"] > 0.8
    assert trainer.callback_metrics["val/f1_tag"] > 0.8
    assert torch.equal(judge.get_parameter(name), before)

    loaded = PEFTModule.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    (again,) = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).validate(
        loaded, data.val_dataloader(), verbose=False
    )
    assert again["val/f1_tag"] == pytest.approx(float(trainer.callback_metrics["val/f1_tag"]))

    plain = loaded.task.tasks["tag"].load_model(source)
    load_adapter(plain, loaded.trained.save(tmp_path / "adapter") / "tag")
    metrics = loaded.task.tasks["tag"].metrics()
    with torch.no_grad():
        for batch in data.of["tag"].val_dataloader():
            out = loaded.task.tasks["tag"].step(plain, batch)
            metrics.update(out.predictions, out.targets)
    assert float(metrics.compute()["f1"]) == pytest.approx(again["val/f1_tag"])


def test_tasks_and_data_have_the_same_names(source: ModelSource, data: SeveralData) -> None:
    with pytest.raises(ConfigError, match="must be of the tasks judge by name, but is judge, tag"):
        SeveralTasks({"judge": SequenceClassification()}).equip(data, source)
    with pytest.raises(ConfigError, match=r"`task\.tasks` must hold tasks by name"):
        SeveralTasks({})
    for name in ("a.b", "keys", "training", ""):
        with pytest.raises(ConfigError, match=r"must have names of letters, digits, - and _"):
            SeveralTasks({name: SequenceClassification()})
    with pytest.raises(ConfigError, match=r"`data\.of` must hold data modules by name"):
        SeveralData({})
