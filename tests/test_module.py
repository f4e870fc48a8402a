"""PEFTModule trains a bare model on a task, and comes back from its checkpoint alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft import PEFT, Freeze, LoRA, PEFTModule
from lightning_peft.errors import AdapterError, CheckpointError, ConfigError, TargetError
from lightning_peft.method import Method
from lightning_peft.methods import FullFineTuning
from lightning_peft.models import ModelSource
from lightning_peft.tasks.sequence_classification import SequenceClassification
from tests.lightning_modules import At, Module, changed, loader, snapshot, trainer

LABELS = ("bad", "fair", "good")


class Classifier(nn.Module):
    """A model that no checkpoint can load again."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            self.embed = nn.Embedding(64, 16)
            self.fc1, self.classifier = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.classifier(self.fc1(self.embed(input_ids).mean(1)).relu())


def rows(size: int = 6, **settings: Any) -> DataLoader[Any]:
    """Return batches of tokens whose first one decides the label."""
    ids = torch.randint(3, 64, (24, 5), generator=torch.Generator().manual_seed(1))
    data = [
        {"input_ids": row, "attention_mask": torch.ones(5, dtype=torch.int64), "labels": row[0] % 3}
        for row in ids
    ]
    return DataLoader(data, batch_size=size, **settings)  # type: ignore[arg-type]


def made(model: Any = None, methods: Any = None, **settings: Any) -> PEFTModule:
    task = SequenceClassification(labels=LABELS)
    return PEFTModule(model or Classifier(), methods or LoRA(r=2), task, **settings)


def saved(folder: Path, module: PEFTModule, **settings: Any) -> Path:
    run = trainer(folder, **settings)
    run.fit(module, rows(), rows())
    run.save_checkpoint(folder / "a.ckpt")
    return folder / "a.ckpt"


@pytest.fixture
def bert_folder(build: Callable[[str], Any], tmp_path: Path) -> Path:
    """A folder with a headless BERT, as one that was pretrained."""
    build("bert_base").model.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_it_trains_logs_and_predicts(tmp_path: Path) -> None:
    module = made(lr=0.05)
    before = snapshot(module)
    run = trainer(tmp_path, max_epochs=8)
    run.fit(module, rows(), rows())
    assert {"train/loss", "val/loss", "val/accuracy", "val/f1"} <= run.callback_metrics.keys()
    assert changed(before, module) <= {
        *(n for n in before if "lora_" in n), "model.classifier.weight", "model.classifier.bias",
    }  # fmt: skip
    (tested,) = run.test(module, rows(), verbose=False)
    assert tested["test/accuracy"] > 0.7
    predicted = [row for batch in run.predict(module, rows()) or [] for row in batch]
    assert len(predicted) == 24
    assert {row["label"] for row in predicted} <= set(LABELS)
    right = [row["label"] == LABELS[int(i) % 3] for row, i in zip(predicted, _first(), strict=True)]
    assert sum(right) / 24 == pytest.approx(tested["test/accuracy"], abs=1e-6)


def _first() -> Tensor:
    return torch.cat([batch["input_ids"][:, 0] for batch in rows()])


def test_the_adapter_is_there_from_the_start_and_errors_too() -> None:
    module = made()
    assert module.adapter.model is module.model
    assert module.adapter.in_place == ["classifier.bias", "classifier.weight"]
    with pytest.raises(TargetError, match="`query` matches no module"):
        made(methods=LoRA(targets="query"))
    with pytest.raises(AdapterError, match="already carries"):
        made(model=module.model, methods=LoRA(r=3))
    assert made(model=module.model).adapter is module.adapter
    with pytest.raises(AdapterError, match="must be a bare module"):
        made(model=nn.Sequential(nn.DataParallel(Classifier())))


def test_groups_have_their_rates_and_the_schedule_its_steps(tmp_path: Path) -> None:
    module = made(methods=[LoRA(r=2), Freeze(layers=0, patterns="fc1.bias")], lr=0.1, head_lr=0.01)
    rates: list[list[float]] = []
    note = At("on_train_batch_start", lambda run, _: rates.append(_rates(run)))
    trainer(tmp_path, note, max_epochs=5).fit(module, rows(), rows())
    groups = module.trainer.optimizers[0].param_groups
    found = {
        (group["initial_lr"], group["weight_decay"]): {p.dim() for p in group["params"]}
        for group in groups
    }
    assert found == {(0.1, 0.01): {2}, (0.1, 0.0): {1}, (0.01, 0.01): {2}, (0.01, 0.0): {1}}
    assert [max(rate) for rate in rates[:3]] == pytest.approx([0.05, 0.1, 0.1 * 18 / 19])
    assert len(rates) == 20
    assert max(rates[-1]) == pytest.approx(0.1 / 19)


@pytest.mark.parametrize("method", [FullFineTuning(), Freeze(layers=0, patterns="fc1")])
def test_only_the_head_has_its_own_rate_where_a_method_trains_in_place(method: Method) -> None:
    adapter = made(methods=method).adapter
    names = {id(p): name for name, p in adapter.named_parameters().items()}
    groups = adapter.parameter_groups(0.1, head_lr=0.01)
    rates = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert {name for name, rate in rates.items() if rate == 0.01} == {
        "classifier.bias",
        "classifier.weight",
    }
    assert "fc1.weight" in rates


def _rates(run: Any) -> list[float]:
    return [group["lr"] for group in run.optimizers[0].param_groups]


def test_a_course_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`max_steps` or `max_epochs`"):
        trainer(tmp_path, max_epochs=-1).fit(made(), rows(), rows())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "`lr` must be 0 or more, but is -1.0"),
        ({"lr": float("nan")}, "`lr` must be 0 or more, but is nan"),
        ({"warmup": 2}, "`warmup` must be a share up to 1, but is 2"),
        ({"schedule": "cosin"}, "must be one of linear, cosine, constant.*Did you mean.*cosine"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(**settings)


def test_a_base_keeps_the_modes_that_it_came_with(
    build: Callable[[str], Any], tmp_path: Path
) -> None:
    model = build("bert").model
    assert not model.training  # as `from_pretrained` returns it
    module = made(model, LoRA(r=2, dropout=0.1))
    modes: list[tuple[bool, bool]] = []
    first = next(delta for _, _, delta in module.adapter.deltas)
    look = At(
        "on_train_batch_start",
        lambda *_: modes.append((model.bert.embeddings.dropout.training, first.training)),
    )
    trainer(tmp_path, look).fit(module, rows(), rows())
    assert set(modes) == {(False, True)}
    model.bert.train()
    modes.clear()
    trainer(tmp_path, look).fit(module, rows(), rows())
    assert set(modes) == {(True, True)}


class Own(PEFTModule):
    """Overrides hooks without a call to the parent's."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = 1

    def on_fit_start(self) -> None:
        self.started = True

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_subclass_may_override_every_hook(tmp_path: Path) -> None:
    module = Own(Classifier(), LoRA(r=2), SequenceClassification(labels=LABELS))
    path = saved(tmp_path, module)
    assert module.started
    file = torch.load(path, weights_only=True)
    assert file["mine"] == 1
    assert len(file["state_dict"]) == 5
    loaded = Own.load_from_checkpoint(path, model=Classifier())
    assert isinstance(loaded, Own)
    assert changed(snapshot(module), loaded) == set()


def test_a_source_is_loaded_again_and_gives_the_same_logits(
    bert_folder: Path, tmp_path: Path
) -> None:
    module = made(ModelSource(name=str(bert_folder)))
    path = saved(tmp_path, module)
    loaded = PEFTModule.load_from_checkpoint(path)
    batch = next(iter(rows()))
    assert torch.equal(module(batch).logits, loaded(batch).logits)
    assert loaded.task.labels == LABELS
    assert path.stat().st_size < (bert_folder / "model.safetensors").stat().st_size * 2
    assert not any("embeddings" in name for name in torch.load(path)["state_dict"])


def test_a_pretrained_model_given_as_an_object_is_loaded_again(
    bert_folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(bert_folder, num_labels=3)
    path = saved(tmp_path, module := made(model))
    loaded = PEFTModule.load_from_checkpoint(path)
    batch = next(iter(rows()))
    assert torch.equal(module(batch).logits, loaded(batch).logits)


def test_a_model_built_by_hand_must_be_given(tmp_path: Path) -> None:
    path = saved(tmp_path, module := made())
    with pytest.raises(CheckpointError, match=r"built by hand.*load_from_checkpoint\(path, model="):
        PEFTModule.load_from_checkpoint(path)
    loaded = PEFTModule.load_from_checkpoint(path, model=Classifier())
    assert changed(snapshot(module), loaded) == set()
    other = Classifier()
    nn.init.normal_(other.fc1.weight)
    with pytest.raises(CheckpointError, match="trained on another base"):
        PEFTModule.load_from_checkpoint(path, model=other)


def test_either_way_of_loading_finds_the_right_one(tmp_path: Path) -> None:
    path = saved(tmp_path, module := made())
    loaded = PEFT.load_from_checkpoint(PEFTModule, path, model=Classifier())
    assert changed(snapshot(module), loaded) == set()
    run = trainer(tmp_path, PEFT(LoRA(r=2)))
    run.fit(Module(), loader(), loader())
    run.save_checkpoint(tmp_path / "foreign.ckpt")
    with pytest.raises(CheckpointError, match=r"PEFT.load_from_checkpoint\(YourModule, path\)"):
        PEFTModule.load_from_checkpoint(tmp_path / "foreign.ckpt")


@pytest.mark.parametrize("method", [LoRA(r=2, dropout=0.2), FullFineTuning()])
def test_it_resumes_exactly(method: Any, tmp_path: Path) -> None:
    def run(epochs: int, path: Path | None = None) -> PEFTModule:
        module = made(methods=method)
        save = At("on_train_epoch_end", _save)
        torch.manual_seed(7 if path is None else 8)
        fit = trainer(tmp_path, save, max_epochs=4, limit_train_batches=4, num_sanity_val_steps=1)
        fit.fit(module, rows(shuffle=True), rows(), ckpt_path=path)
        return module

    whole = run(4)
    resumed = run(4, tmp_path / "1.ckpt")
    assert changed(snapshot(whole), resumed) == set()


def _save(run: Any, module: Any) -> None:
    run.save_checkpoint(f"{run.default_root_dir}/{run.current_epoch}.ckpt")


def test_a_longer_run_follows_a_longer_course(tmp_path: Path) -> None:
    path = saved(tmp_path, made(), max_epochs=1)
    rates: list[float] = []
    note = At("on_train_batch_start", lambda run, _: rates.append(_rates(run)[0]))
    module = made()
    trainer(tmp_path, note, max_epochs=3).fit(module, rows(), rows(), ckpt_path=path)
    assert rates[1:] == pytest.approx([1e-3 * left / 11 for left in range(7, 0, -1)])


@pytest.mark.parametrize(
    "callback", [EMAWeightAveraging(decay=0.9), StochasticWeightAveraging(0.01, 1)]
)
def test_averages_see_the_adapter(callback: Any, tmp_path: Path) -> None:
    module = made()
    before = snapshot(module)
    run = trainer(tmp_path, callback, max_epochs=3, reload_dataloaders_every_n_epochs=0)
    if isinstance(callback, StochasticWeightAveraging):
        module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)  # type: ignore[method-assign]
    run.fit(module, rows(), rows())
    assert "model.fc1.lightning_peft.default_lora.lora_B" in changed(before, module)
    assert not {"model.fc1.weight", "model.embed.weight"} & changed(before, module)


def test_after_merging_it_tests_the_same_and_cannot_be_fitted(tmp_path: Path) -> None:
    module = made(lr=0.05)
    run = trainer(tmp_path, max_epochs=4)
    run.fit(module, rows(), rows())
    (wanted,) = run.test(module, rows(), verbose=False)
    module.adapter.merge()
    (found,) = run.test(module, rows(), verbose=False)
    assert found == pytest.approx(wanted, abs=1e-5)
    with pytest.raises(AdapterError, match="removed or merged"):
        trainer(tmp_path).fit(module, rows(), rows())
