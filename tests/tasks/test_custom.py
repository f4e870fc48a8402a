"""A task of the user's own: what its function must return, and how it is named in files."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_peft import LoRA, PEFTModule, config
from lightning_peft.config import instantiate, to_spec
from lightning_peft.errors import ConfigError, NonFiniteError
from lightning_peft.tasks.custom import CustomTask
from tests.conftest import BERT
from tests.tasks import own_functions as own

R2 = {"r2": {"_target_": "torchmetrics.regression.R2Score"}}


def model() -> torch.nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**{**BERT, "num_labels": 1}))


def fit(task: CustomTask, folder: Path, **settings: object) -> tuple[Trainer, PEFTModule]:
    module = PEFTModule(model(), LoRA(r=4), task, lr=0.01)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **{"max_epochs": 1, **settings},
    )
    trainer.fit(module, datamodule=own.Scores())
    return trainer, module


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "_user_packages", {"tests"})


@pytest.mark.parametrize("function", [own.loss, own.as_step])
def test_a_function_is_trained_and_measured(function: object, tmp_path: Path) -> None:
    task = CustomTask(function, own.predict, R2, monitor="val/r2", mode="max")
    trainer, module = fit(task, tmp_path, max_epochs=20)
    assert trainer.callback_metrics["val/r2"] > 0.1  # 0 is the mean of all
    (found,) = trainer.validate(module, datamodule=own.Scores(), verbose=False)
    assert set(found) == {"val/loss", "val/r2"}
    (rows,) = trainer.predict(module, datamodule=own.Scores())
    assert [set(row) for row in rows] == [{"prediction"}] * 5


def test_a_loss_alone_is_enough(tmp_path: Path) -> None:
    trainer, _ = fit(CustomTask(own.alone), tmp_path, max_epochs=2)
    assert trainer.callback_metrics["val/loss"] < 1


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (own.by_row, r"by_row` must return the loss as a scalar .* a tensor of shape \(4,\)"),
        (own.number, "must return the loss as a scalar tensor.*returned float"),
        (own.pair, r"must return .*\(loss, predictions, targets\), but returned \(a tensor"),
        (own.alone, r"must return \(loss, predictions, targets\), which `task.metrics` compare"),
    ],
)
def test_what_a_function_returns_is_checked(function: object, message: str) -> None:
    batch = next(iter(own.Scores(batch_size=4).val_dataloader()))
    with pytest.raises(ConfigError, match=message):
        CustomTask(function, metrics=R2).step(model(), batch)


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="The loss is nan at step 0"):
        fit(CustomTask(own.broken), tmp_path, num_sanity_val_steps=0)
    with pytest.raises(NonFiniteError, match="broken` must return a finite loss"):
        fit(CustomTask(own.broken), tmp_path, num_sanity_val_steps=1)


def test_a_task_is_named_and_found_again(allowed: None) -> None:
    task = CustomTask(own.loss, own.predict, R2, monitor="val/r2", mode="max", config={"a": 1})
    spec = to_spec(task)
    assert spec["loss"] == "tests.tasks.own_functions.loss"
    assert to_spec(instantiate(spec)) == spec


def test_a_checkpoint_names_the_function_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    trainer, module = fit(CustomTask(own.loss, metrics=R2), tmp_path)
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    torch.manual_seed(0)
    base = model()
    with pytest.raises(ConfigError, match=r"`task.loss` must be a function in a package"):
        PEFTModule.load_from_checkpoint(tmp_path / "own.ckpt", model=base)
    monkeypatch.setattr(config, "_user_packages", {"tests"})
    loaded = PEFTModule.load_from_checkpoint(tmp_path / "own.ckpt", model=base)
    for name, tensor in module.adapter.state_dict().items():
        assert torch.equal(tensor, loaded.adapter.state_dict()[name])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "os.system"}, r"`task.loss` must be a function in a package of your own"),
        ({"loss": "tests.tasks.own_functions.los"}, "Did you mean `loss`"),
        ({"loss": "tests.tasks.own_functions.mse_loss"}, "comes from `torch.nn.functional`"),
        ({"loss": "tests.tasks.own_functions.Scores"}, "must name a function of"),
        ({"loss": "tests.nowhere.loss"}, "does not exist"),
        ({"loss": lambda model, batch: None}, "must be a function at the top of a module"),
        ({"monitor": "val/r3", "metrics": R2}, "must be one of val/loss, val/r2.*Did you mean"),
        ({"metrics": {"a.b": R2["r2"]}}, "`task.metrics` must have names that torchmetrics takes"),
        ({"metrics": {"keys": R2["r2"]}}, "`task.metrics` must have names that torchmetrics takes"),
        ({"metrics": {"x": {"_target_": "torch.optim.SGD"}}}, "`task.metrics.x` must be a Metric"),
        ({"metrics": {"x": {"_target_": "os.system"}}}, "`task.metrics.x._target_` must be"),
    ],
)
def test_settings_are_checked(allowed: None, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CustomTask(**{"loss": own.loss, **settings})


def test_nothing_is_predicted_without_a_function() -> None:
    with pytest.raises(ConfigError, match=r"`task.predict` must be a function"):
        CustomTask(own.loss).predictions(model(), {})
