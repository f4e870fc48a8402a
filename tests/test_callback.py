"""The PEFT callback is all that a foreign LightningModule needs."""

import argparse
import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from lightning_peft import PEFT, Freeze, LoRA, PEFTModule, inject
from lightning_peft.errors import AdapterError, CheckpointError, ConfigError, TargetError
from tests.lightning_modules import (
    Around,
    At,
    Module,
    changed,
    loader,
    network,
    repeated,
    snapshot,
    trainer,
)

KINDS = ["mlp", "cnn", "tagger", "encoder_with_head", "bert", "llama", "vit", "gpt2_classifier"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # torch's own encoder
@pytest.mark.parametrize("kind", KINDS)
def test_a_foreign_module_trains_and_its_base_does_not_change(
    kind: str, build: Callable[[str], Any], tmp_path: Path
) -> None:
    example = build(kind)
    module = Around(example.model.train())
    before, kept = snapshot(module), copy.deepcopy(example.model)
    data = repeated(example.inputs)
    trainer(tmp_path, PEFT(LoRA(r=2))).fit(module, data, data)
    adapter = module.peft_adapter  # type: ignore[operator]
    prefix = "" if adapter.model is module else "model."
    assert changed(before, module) <= {f"{prefix}{name}" for name in adapter.in_place}
    assert all(p.any() for n, p in adapter.named_parameters().items() if n.endswith("lora_B"))
    with adapter.disabled():
        assert changed(before, module) == set()
    adapter.remove()
    assert changed(before, module) == set()
    assert torch.equal(example.output(example.model.eval()), example.output(kept.eval()))


@pytest.mark.parametrize("build", ["init", "setup", "configure_model"])
def test_the_model_may_be_built_in_any_hook(build: str, tmp_path: Path) -> None:
    module = Module(build)
    peft = PEFT(LoRA(r=2))
    run = trainer(tmp_path, peft)
    run.fit(module, loader(), loader())
    assert changed(snapshot(network()), module.network) == set()
    assert module.stage == "fit"
    names = list(peft.adapter.named_parameters())
    assert all("lora_" in name for name in names)
    run.validate(module, loader(), verbose=False)
    run.test(module, loader(), verbose=False)
    outputs = run.predict(module, loader())
    assert list(peft.adapter.named_parameters()) == names
    assert outputs is not None
    with peft.adapter.disabled():
        bare = run.predict(module, loader())
    assert bare is not None
    assert not torch.equal(outputs[0], bare[0])


def test_a_built_in_whichever_hook_trains_to_the_same_adapter(tmp_path: Path) -> None:
    found = []
    for build in ("init", "setup", "configure_model"):
        torch.manual_seed(0)
        module = Module(build)
        trainer(tmp_path, PEFT(LoRA(r=2))).fit(module, loader(), loader())
        found.append(module.peft_adapter.state_dict())
    for state in found[1:]:
        assert all(torch.equal(tensor, state[name]) for name, tensor in found[0].items())


class Captured(Module):
    """Lists its parameters before anything is injected."""

    def __init__(self) -> None:
        super().__init__()
        self.listed = list(self.parameters())

    def configure_optimizers(self) -> Any:
        return AdamW(self.listed, lr=0.05)


class Grouped(Module):
    """Two groups, with and without weight decay, and a schedule."""

    def configure_optimizers(self) -> Any:
        decayed = [p for p in self.parameters() if p.dim() > 1]
        others = [p for p in self.parameters() if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = AdamW(groups, lr=0.05)
        return [optimizer], [{"scheduler": StepLR(optimizer, 1), "interval": "step"}]


class Plateau(Module):
    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=0.05, momentum=0.9)
        schedule = {"scheduler": ReduceLROnPlateau(optimizer), "monitor": "val/loss"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class Adversarial(Module):
    """Two optimizers, stepped by hand."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        first = [p for n, p in self.named_parameters() if "fc1" in n]
        others = [p for n, p in self.named_parameters() if "fc1" not in n]
        return AdamW(first, lr=0.05), SGD(others, lr=0.05)


class Newton(Module):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


@pytest.mark.parametrize("cls", [Captured, Grouped, Plateau, Adversarial, Newton])
def test_whatever_the_optimizer_code_does_only_the_adapter_is_trained(
    cls: type[Module], tmp_path: Path
) -> None:
    module = cls()
    peft = PEFT(LoRA(r=2), train="network.norm")
    trainer(tmp_path, peft, At("on_train_start", _one_place_each)).fit(module, loader(), loader())
    found = changed(snapshot(network()), module.network)
    assert found == {f"norm.{n}" for n in ("weight", "bias", "running_mean", "running_var")} | {
        "norm.num_batches_tracked"
    }
    deltas = peft.adapter.named_parameters()
    assert all(p.any() for name, p in deltas.items() if name.endswith("lora_B"))


def _one_place_each(run: Any, module: Any) -> None:
    held = [p for o in run.optimizers for group in o.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == set(module.peft_adapter.parameters())


def test_several_fits_inject_once_and_go_on(tmp_path: Path) -> None:
    module, peft = Module(), PEFT(LoRA(r=2))
    run = trainer(tmp_path, peft)
    run.validate(module, loader(), verbose=False)
    run.fit(module, loader(), loader())
    adapter = peft.adapter
    first = adapter.state_dict()["network.fc1.lightning_peft.default_lora.lora_B"].clone()
    run.fit_loop.max_epochs = 3
    run.fit(module, loader(), loader())
    other = PEFT(LoRA(r=2))
    trainer(tmp_path, other).fit(module, loader(), loader())
    assert other.adapter is adapter
    last = adapter.state_dict()["network.fc1.lightning_peft.default_lora.lora_B"]
    assert not torch.equal(first, last)
    assert sum("lora_A" in name for name, _ in module.named_parameters()) == 3
    assert [base.__name__ for base in type(module).__mro__].count("PEFTHooks") == 1


def test_an_equal_adapter_is_taken_over_and_another_is_refused(tmp_path: Path) -> None:
    module = Module()
    adapter = inject(module, LoRA(r=2), train="network.norm")
    run = trainer(tmp_path, PEFT(LoRA(r=2), train="network.norm"))
    run.fit(module, loader(), loader())
    assert module.peft_adapter is adapter
    for other in (PEFT(LoRA(r=3), train="network.norm"), PEFT(LoRA(r=2))):
        with pytest.raises(AdapterError, match=r"already carries Adapter\('default'"):
            trainer(tmp_path, other).fit(module, loader(), loader())
    assert module.peft_adapter is adapter


def test_an_adapter_of_a_part_is_taken_over_unless_something_is_trained_beside_it(
    tmp_path: Path,
) -> None:
    module = Module()
    adapter = inject(module.network, LoRA(r=2))
    trainer(tmp_path, PEFT(LoRA(r=2))).fit(module, loader(), loader())
    assert module.peft_adapter is adapter
    beside = Module()
    beside.scale = nn.Parameter(torch.ones(1))
    inject(beside.network, LoRA(r=2))
    with pytest.raises(AdapterError, match="`scale` is trainable, but lies outside"):
        trainer(tmp_path, PEFT(LoRA(r=2))).fit(beside, loader(), loader())


class Named(Module):
    """Has names of its own that a library may be tempted to take."""

    def __init__(self) -> None:
        super().__init__()
        self.adapter, self.injection, self.fingerprint = "a", "i", "f"
        self.methods = self.name = self.trained = "mine"


def test_the_users_own_names_are_not_shadowed(tmp_path: Path) -> None:
    module = Named()
    trainer(tmp_path, PEFT(LoRA(r=2))).fit(module, loader(), loader())
    assert (module.adapter, module.injection, module.fingerprint) == ("a", "i", "f")
    assert module.methods == module.name == module.trained == "mine"
    assert type(module).__name__ == "Named"
    assert isinstance(module, Named)


def test_a_trained_module_copies_and_pickles(tmp_path: Path) -> None:
    module = Module()
    trainer(tmp_path, PEFT(LoRA(r=2))).fit(module, loader(), loader())
    x = torch.randn(3, 8)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        twin.network.dropout = module.network.dropout = nn.Identity()
        assert torch.equal(twin(x), module(x))
        assert twin.peft_adapter.model is twin
        trainer(tmp_path, PEFT(LoRA(r=2))).fit(twin, loader(), loader())
        assert not torch.equal(twin(x), module(x))


def test_after_removal_or_merging_the_module_is_a_plain_one(tmp_path: Path) -> None:
    module = Module()
    before = snapshot(module)
    trainer(tmp_path, PEFT(LoRA(r=2))).fit(module, loader(), loader())
    module.peft_adapter.remove()
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, loader(), loader())
    assert type(module) is Module
    assert "network.fc1.weight" in changed(before, module)
    run.save_checkpoint(tmp_path / "plain.ckpt")
    again = Module.load_from_checkpoint(tmp_path / "plain.ckpt")
    assert changed(snapshot(module), again) == set()

    trainer(tmp_path, PEFT(LoRA(r=2))).fit(module, loader(), loader())
    trained, x = module.eval()(torch.ones(2, 8)), torch.ones(2, 8)
    module.peft_adapter.merge()
    run.save_checkpoint(tmp_path / "merged.ckpt")
    merged = Module.load_from_checkpoint(tmp_path / "merged.ckpt").eval()
    assert torch.allclose(merged(x), trained, atol=1e-6)


def test_two_callbacks_are_refused(tmp_path: Path) -> None:
    module = Module()
    before = list(module.state_dict())
    with pytest.raises(AdapterError, match="one PEFT callback, but there are several"):
        trainer(tmp_path, PEFT(LoRA()), PEFT(Freeze())).fit(module, loader(), loader())
    assert list(module.state_dict()) == before


def test_the_callback_is_refused_by_a_peft_module(
    build: Callable[[str], Any], tmp_path: Path
) -> None:
    from lightning_peft.tasks.sequence_classification import SequenceClassification

    class Mine(PEFTModule):
        pass

    task = SequenceClassification(labels=["a", "b", "c"])
    data = repeated(build("bert").inputs)
    for cls in (PEFTModule, Mine):
        module = cls(build("bert").model, LoRA(r=2), task)
        with pytest.raises(AdapterError, match="A PEFTModule injects by itself"):
            trainer(tmp_path, PEFT(LoRA(r=2))).fit(module, data, data)


def test_what_matches_nothing_or_is_wrapped_leaves_the_module_as_it_was(tmp_path: Path) -> None:
    module = Module()
    keys, modes = list(module.state_dict()), [type(m) for m in module.network.modules()]
    with pytest.raises(TargetError, match=r"`fc3` matches no module.*fc1"):
        trainer(tmp_path, PEFT(LoRA(targets="fc3"))).fit(module, loader(), loader())
    module.network = nn.DataParallel(module.network)  # type: ignore[assignment]
    with pytest.raises(AdapterError, match="`network` must be a bare module"):
        trainer(tmp_path, PEFT(LoRA())).fit(module, loader(), loader())
    module.network = module.network.module
    assert list(module.state_dict()) == keys
    assert [type(m) for m in module.network.modules()] == modes
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_an_optimizer_for_nothing_that_is_trained_is_named(tmp_path: Path) -> None:
    class Halves(Module):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return SGD(self.network.fc1.parameters(), 0.1), SGD(self.network.fc2.parameters(), 0.1)

    with pytest.raises(ConfigError, match=r"`network.head.*` is trained, but no optimizer"):
        trainer(tmp_path, PEFT(LoRA(r=2))).fit(Halves(), loader(), loader())


def test_the_adapter_of_a_callback_that_has_not_run_is_asked_for_in_vain() -> None:
    with pytest.raises(AdapterError, match="injected when a Trainer runs"):
        _ = PEFT(LoRA()).adapter


class Reader(LightningModule):
    """Built from saved settings, named ones and others."""

    def __init__(self, width: int = 4, *, path: Any = "", **more: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(8, width), nn.Linear(width, 1))
        self.path, self.more = path, more

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.net(batch[0]) - 1).pow(2).mean()

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.01)


class Whole(Reader):
    """Takes all settings as one object, and stores it as it is."""

    def __init__(self, conf: Any) -> None:
        super().__init__(conf.net["width"])
        self.save_hyperparameters(conf)
        self.conf = conf


def _settings(kind: str) -> Any:
    plain = {"net": {"width": 4}, "rates": [0.1, 0.2]}
    return OmegaConf.create(plain) if kind == "omegaconf" else argparse.Namespace(**plain)


@pytest.mark.parametrize("kind", ["omegaconf", "namespace"])
def test_settings_given_as_one_object_come_back_as_such(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Whole(_settings(kind))
    run = trainer(tmp_path, PEFT(LoRA(r=2)))
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    torch.manual_seed(0)
    loaded = PEFT.load_from_checkpoint(Whole, tmp_path / "a.ckpt")
    assert changed(snapshot(module), loaded) == set()
    assert loaded.conf.net["width"] == 4
    assert list(loaded.conf.rates) == [0.1, 0.2]
    assert isinstance(loaded.conf, DictConfig) == (kind == "omegaconf")


def test_settings_of_any_plain_kind_are_stored_safely(tmp_path: Path) -> None:
    torch.manual_seed(0)
    extra = {"rate": np.float32(0.5), "sizes": np.arange(3), "deep": {"p": Path("x"), 3: (1, 2)}}
    more = {**extra, "conf": OmegaConf.create({"a": [{"b": 1}]}), "dtype": torch.bfloat16}
    module = Reader(6, path=Path("y/z"), kwargs="k", **more)
    run = trainer(tmp_path, PEFT(LoRA(r=2)))
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    torch.manual_seed(0)
    loaded = PEFT.load_from_checkpoint(Reader, tmp_path / "a.ckpt", path="given")
    assert changed(snapshot(module), loaded) == set()
    assert loaded.path == "given"
    assert loaded.more == {
        "rate": 0.5,
        "sizes": [0, 1, 2],
        "deep": {"p": "x", 3: (1, 2)},
        "conf": {"a": [{"b": 1}]},
        "dtype": torch.bfloat16,
        "kwargs": "k",
    }


@pytest.mark.parametrize("build", ["init", "setup", "configure_model"])
def test_a_module_is_loaded_from_its_checkpoint(build: str, tmp_path: Path) -> None:
    module = Module(build)
    run = trainer(tmp_path, PEFT(LoRA(r=2), train="network.norm"))
    run.fit(module, loader(), loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    torch.rand(7)
    loaded = PEFT.load_from_checkpoint(Module, tmp_path / "a.ckpt", lr=0.5)
    assert (loaded.lr, loaded.build) == (0.5, build)
    assert changed(snapshot(module), loaded) == set()
    x = torch.randn(4, 8)
    assert torch.equal(loaded.eval()(x), module.eval()(x))
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)["lightning_peft"]["random"][0]
    assert not torch.equal(stored["torch"], torch.get_rng_state())  # only a fit goes back to it


class Storing(LightningModule):
    """Stores its model among the hyper-parameters, of which Lightning warns."""

    def __init__(self, model: nn.Module, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = model

    configure_optimizers = Reader.configure_optimizers

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.model(batch[0]) - 1).pow(2).mean()


@pytest.mark.filterwarnings("ignore:Attribute 'model' is an instance of `nn.Module`")
def test_a_model_among_the_settings_is_not_stored_but_asked_for(tmp_path: Path) -> None:
    module = Storing(network())
    run = trainer(tmp_path, PEFT(LoRA(r=2)))
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"] == {"lr": 0.1}
    with pytest.raises(CheckpointError, match=r"`model` of Storing is not in .*, model=\.\.\.\)"):
        PEFT.load_from_checkpoint(Storing, tmp_path / "a.ckpt")
    loaded = PEFT.load_from_checkpoint(Storing, tmp_path / "a.ckpt", model=network())
    assert changed(snapshot(module), loaded) == set()


class Data(LightningDataModule):
    def __init__(self, conf: Any) -> None:
        super().__init__()
        self.save_hyperparameters(conf)

    train_dataloader = staticmethod(loader)


def test_settings_of_the_data_are_stored_safely_too(tmp_path: Path) -> None:
    run = trainer(tmp_path, PEFT(LoRA(r=2)))
    run.fit(Reader(6), datamodule=Data(OmegaConf.create({"rows": [1, 2], "where": "here"})))
    run.save_checkpoint(tmp_path / "a.ckpt")
    file = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert file["datamodule_hyper_parameters"] == {"rows": [1, 2], "where": "here"}
    assert Data.load_from_checkpoint(tmp_path / "a.ckpt").hparams["rows"] == [1, 2]


def test_a_module_that_was_injected_by_hand_is_loaded(tmp_path: Path) -> None:
    class Injected(Module):
        def __init__(self) -> None:
            super().__init__()
            inject(self.network, LoRA(r=2))

    module = Injected()
    run = trainer(tmp_path, PEFT(LoRA(r=2)))
    run.fit(module, loader(), loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded = PEFT.load_from_checkpoint(Injected, tmp_path / "a.ckpt")
    assert changed(snapshot(module), loaded) == set()


def test_what_a_plain_lightning_wrote_is_not_ours_to_load(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.fit(Module(), loader(), loader())
    run.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(CheckpointError, match="but is a plain one instead"):
        PEFT.load_from_checkpoint(Module, tmp_path / "plain.ckpt")
