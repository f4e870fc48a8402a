"""What the hooks do beside training: modes, guards, tuners, averages, precisions, compilation."""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, seed_everything
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.optim import SGD

from lightning_peft import PEFT, Freeze, LoRA, load_adapter
from lightning_peft.errors import ConfigError, NonFiniteError, TargetError
from lightning_peft.methods import FullFineTuning
from lightning_peft.training import finite
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


class Plain(Around):
    """A network without normalisation, built in `__init__` without further hooks."""

    def __init__(self, lr: float = 0.05) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            super().__init__(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)))
        self.lr = lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=self.lr)


# modes


def test_frozen_norms_stay_in_eval_mode_without_a_warning(tmp_path: Path) -> None:
    module = Module()  # a BatchNorm inside
    modes: list[bool] = []
    look = At("on_train_batch_start", lambda _, m: modes.append(m.network.norm.training))
    trainer(tmp_path, PEFT(LoRA(r=2)), look).fit(module, loader(), loader())
    assert not any(modes)


def test_a_module_that_the_user_holds_in_eval_mode_is_still_warned_of(tmp_path: Path) -> None:
    module = Module()
    module.network.dropout.eval()
    with pytest.warns(UserWarning, match=r"Found 2 module\(s\) in eval mode"):
        trainer(tmp_path, PEFT(LoRA(r=2))).fit(module, loader(), loader())
    assert not module.network.dropout.training
    assert module.network.fc1.training


@pytest.mark.parametrize("method", [LoRA(r=2), Freeze(layers=1)])
def test_gradient_checkpointing_recomputes_and_gives_the_same(
    method: Any, build: Callable[[str], Any], tmp_path: Path
) -> None:
    found, calls = [], 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    for recompute in (False, True):
        torch.manual_seed(0)
        example = build("bert")
        if recompute:
            example.model.activation_checkpointing_enable()
        layer = example.model.bert.encoder.layer[-1]
        layer.attention.register_forward_pre_hook(count)
        module = Around(example.model)
        data = repeated(example.inputs)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode")
            trainer(tmp_path, PEFT(method)).fit(module, data, data)
        found.append((calls, snapshot(module)))
        calls = 0
    assert found[1][0] == found[0][0] + 2 * 2  # again for each of two batches in two epochs
    for name, tensor in found[0][1].items():
        assert torch.allclose(tensor, found[1][1][name], atol=1e-6)


# schedules


def test_layers_that_a_schedule_unfreezes_do_not_move_before(
    build: Callable[[str], Any], tmp_path: Path
) -> None:
    example = build("bert")
    module, method = Around(example.model.train()), Freeze(layers=1, schedule={2: 2})
    before, later = snapshot(module), "model.bert.encoder.layer.0."
    seen: list[set[str]] = []
    note = At("on_train_epoch_end", lambda _, m: seen.append(changed(before, m)))
    data = repeated(example.inputs)
    settings = {"max_epochs": 3, "accumulate_grad_batches": 2}
    run = trainer(tmp_path, PEFT(method), note, At("on_train_epoch_end", _save), **settings)
    run.fit(module, data, data)
    assert [any(name.startswith(later) for name in names) for names in seen] == [False, False, True]
    assert all(any("layer.1." in name for name in names) for names in seen)
    assert not any("embeddings" in name for name in seen[-1])

    again = Around(build("bert").model.train())
    trainer(tmp_path, PEFT(method), **settings).fit(
        again, data, data, ckpt_path=tmp_path / "1.ckpt"
    )
    assert changed(snapshot(module), again) == set()


def _save(run: Any, module: Any) -> None:
    run.save_checkpoint(run.default_root_dir + f"/{run.current_epoch}.ckpt")


# guards


class Failing(Module):
    """Gives a bad loss, or only a bad gradient, in its fourth batch."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if self.trainer.fit_loop.total_batch_idx < 3:
            return loss
        if self.how == "gradient":
            loss.register_hook(lambda grad: grad * float("inf"))
            return loss
        return loss * float(self.how)


@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_non_finite_step_is_not_taken(how: str, accumulate: int, tmp_path: Path) -> None:
    module = Failing(how)
    states: list[dict[str, Tensor]] = []
    note = At("on_train_batch_end", lambda _, m: states.append(snapshot(m)))
    keep = ModelCheckpoint(tmp_path / "c", every_n_train_steps=1, save_on_exception=True)
    run = trainer(
        tmp_path, PEFT(LoRA(r=2)), note, keep, enable_checkpointing=True,
        accumulate_grad_batches=accumulate, gradient_clip_val=1.0,
    )  # fmt: skip
    cause = r"gradient of `network\..*` is not" if how == "gradient" else f"The loss is {how}"
    with pytest.raises(NonFiniteError, match=rf"{cause}.* at step {3 // accumulate} of epoch 0"):
        run.fit(module, loader(), loader())
    assert changed(states[-1], module) == set()
    loaded = PEFT.load_from_checkpoint(Module, keep.best_model_path)
    assert changed(snapshot(loaded), module) == set()


class Aside(Plain):
    """Has a layer that no input reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.model.aside = nn.Linear(8, 3)
        self.model.forward = self.model[:3].forward


def test_a_loss_that_nothing_trained_has_a_part_in_is_refused(tmp_path: Path) -> None:
    peft = PEFT(LoRA(targets="aside"), head=False)
    with pytest.raises(TargetError, match=r"reaches none of the 2 tensors, such as `model.aside"):
        trainer(tmp_path, peft).fit(Aside(), loader(), loader())


def test_a_half_loss_and_gradients_under_a_scaler_are_left_to_it() -> None:
    alone = SimpleNamespace(world_size=1)
    assert finite.is_watched(torch.ones(()), alone)
    assert not finite.is_watched(torch.ones((), dtype=torch.float16), alone)
    assert not finite.is_watched(torch.ones(()), SimpleNamespace(world_size=2))
    parameter = nn.Parameter(torch.ones(1))
    parameter.grad = torch.full((1,), float("inf"))
    optimizer = SGD([parameter], lr=0.1)

    def module(scaler: Any) -> Any:
        plugin = SimpleNamespace(scaler=scaler)
        peft = SimpleNamespace(model=None, named_parameters=lambda: {"p": parameter})
        return SimpleNamespace(
            trainer=SimpleNamespace(precision_plugin=plugin), global_step=0, current_epoch=0,
            peft_adapter=peft, named_modules=lambda: [("", None)],
        )  # fmt: skip

    finite.require_finite(module(object()), torch.ones(()), optimizer)
    with pytest.raises(NonFiniteError, match="gradient of `p`"):
        finite.require_finite(module(None), torch.ones(()), optimizer)
    with pytest.raises(NonFiniteError, match="loss is nan"):
        finite.require_finite(module(object()), torch.tensor(float("nan")), optimizer)


def test_finite_gradients_whose_norm_overflows_are_stepped(tmp_path: Path) -> None:
    class Steep(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * 1e25

    module = Steep(lr=1e-25)
    settings = {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}
    trainer(tmp_path, PEFT(LoRA(r=2)), **settings).fit(module, loader(), loader())
    assert module.trainer.global_step == 12


# tuners


class Diverging(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch) * (float("nan") if self.trainer.global_step > 10 else 1)


def test_the_learning_rate_finder_may_diverge_and_leaves_no_trace(tmp_path: Path) -> None:
    module = Diverging()
    run = trainer(tmp_path, PEFT(LoRA(r=2)), max_epochs=6)
    settings = {"num_training": 20, "early_stop_threshold": None}
    found = Tuner(run).lr_find(module, loader(), loader(), **settings)
    assert found is not None
    assert not torch.tensor(found.results["loss"]).isfinite().all()
    assert list(tmp_path.iterdir()) == []
    assert not any(p.any() for n, p in module.named_parameters() if n.endswith("lora_B"))
    assert changed(snapshot(network()), module.network) == set()
    with pytest.raises(NonFiniteError, match="at step 11"):
        run.fit(module, loader(), loader())


def test_the_learning_rate_finder_may_be_a_callback(tmp_path: Path) -> None:
    module = Module()
    finder = LearningRateFinder(num_training_steps=30)
    trainer(tmp_path, PEFT(LoRA(r=2)), finder, max_epochs=6).fit(module, loader(), loader())
    assert module.trainer.global_step == 36
    assert module.lr != 0.05


class Rows(LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 1

    def train_dataloader(self) -> Any:
        return loader(64, batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return loader(batch_size=self.batch_size)


def test_the_batch_size_finder_leaves_no_trace(tmp_path: Path) -> None:
    module, rows = Module(), Rows()
    run = trainer(tmp_path, PEFT(LoRA(r=2)))
    Tuner(run).scale_batch_size(module, datamodule=rows, max_trials=2, init_val=4)
    assert rows.batch_size == 8
    assert list(tmp_path.iterdir()) == []
    assert not any(p.any() for n, p in module.named_parameters() if n.endswith("lora_B"))
    run.fit(module, datamodule=rows)
    assert any(p.any() for n, p in module.named_parameters() if n.endswith("lora_B"))


# averages


class Buffered(Plain):
    """With a buffer whose average rounds to another value."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("third", torch.full((5,), 1 / 3))
        self.register_buffer("scratch", torch.full((5,), 1 / 3), persistent=False)


def test_a_moving_average_leaves_the_base_alone(tmp_path: Path) -> None:
    module = Buffered()
    before, drifted = snapshot(module), set[str]()
    look = At("on_validation_epoch_end", lambda _, m: drifted.update(changed(before, m)))
    ema = EMAWeightAveraging(decay=0.9, use_buffers=True)
    run = trainer(tmp_path, PEFT(LoRA(r=2)), look, ema)
    run.fit(module, loader(), loader())
    assert drifted | changed(before, module) == set()
    assert torch.equal(module.scratch, torch.full((5,), 1 / 3))
    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded = PEFT.load_from_checkpoint(Buffered, tmp_path / "a.ckpt")
    assert changed(snapshot(module), loaded) == set()


def test_a_moving_average_is_saved_small_and_resumed(tmp_path: Path) -> None:
    def fit(epochs: int, path: Path | None = None) -> tuple[Buffered, dict[str, Tensor]]:
        torch.manual_seed(epochs)
        module, start = Buffered(), dict[str, Tensor]()
        note = At("on_train_start", lambda _, m: start.update(snapshot(m)))
        save, ema = At("on_train_epoch_end", _save), EMAWeightAveraging(decay=0.9)
        run = trainer(tmp_path, PEFT(LoRA(r=2)), ema, note, save, max_epochs=epochs)
        run.fit(module, loader(), loader(), ckpt_path=path)
        return module, start

    first, _ = fit(1)
    file = torch.load(tmp_path / "0.ckpt", weights_only=True)
    average, current = (file[key] for key in ("state_dict", "current_model_state"))
    for state in (average, current):
        assert sum("lora_" in name for name in state) == 4
        assert not any(name.endswith(("weight", "bias")) for name in state)
    name = "model.0.lightning_peft.default_lora.lora_B"
    assert not torch.equal(average[name], current[name])
    assert torch.equal(first.state_dict()[name], average[name])  # copied in at the end

    resumed, start = fit(2, tmp_path / "0.ckpt")
    assert torch.equal(start[name], current[name])
    assert changed(snapshot(Buffered()), resumed) == set()


def test_an_average_that_copies_before_the_injection_is_refused(tmp_path: Path) -> None:
    for callback in (EMAWeightAveraging(), StochasticWeightAveraging(0.01)):
        run = trainer(tmp_path, callback, PEFT(LoRA(r=2)))
        with pytest.raises(ConfigError, match=f"must list PEFT before {type(callback).__name__}"):
            run.fit(Plain(), loader(), loader())


def test_stochastic_averaging_works_and_is_saved_small(tmp_path: Path) -> None:
    module = Plain()
    before = snapshot(module)
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    run = trainer(tmp_path, PEFT(LoRA(r=2)), swa, max_epochs=3)
    run.fit(module, loader(), loader())
    assert changed(before, module) == set()
    run.save_checkpoint(tmp_path / "a.ckpt")
    (state,) = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"].values()
    assert len(state["average_model_state"]) == 4
    fit = trainer(tmp_path, PEFT(LoRA(r=2)), StochasticWeightAveraging(0.01, 1), max_epochs=4)
    again = Plain()
    fit.fit(again, loader(), loader(), ckpt_path=tmp_path / "a.ckpt")
    assert changed(before, again) == set()


def test_stochastic_averaging_beside_a_frozen_norm_is_refused(tmp_path: Path) -> None:
    module = Module()
    before = snapshot(module)
    swa = StochasticWeightAveraging(swa_lrs=0.01)
    with pytest.raises(ConfigError, match="resets the running statistics"):
        trainer(tmp_path, PEFT(LoRA(r=2)), swa).fit(module, loader(), loader())
    assert changed(before, module) == set()
    trainer(tmp_path, PEFT(FullFineTuning()), swa).fit(Module(), loader(), loader())


# the Trainer's other settings


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(precision: str, tmp_path: Path) -> None:
    module = Module()
    run = trainer(tmp_path, PEFT(LoRA(r=2), train="network.head"), precision=precision)
    run.fit(module, loader(), loader())
    base = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}
    wanted = base[precision]
    assert module.network.fc1.weight.dtype == wanted
    delta = torch.float64 if precision == "64-true" else torch.float32
    named = dict(module.named_parameters())
    assert {p.dtype for n, p in named.items() if "lora_" in n} == {delta}
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert set(torch.load(tmp_path / "a.ckpt")["state_dict"]) == {
        *(n for n in named if "lora_" in n), "network.head.weight", "network.head.bias",
        next(n for n in torch.load(tmp_path / "a.ckpt")["state_dict"] if n.startswith("This")),
    }  # fmt: skip
    again = Module()
    fit = trainer(
        tmp_path, PEFT(LoRA(r=2), train="network.head"), precision=precision, max_epochs=3
    )
    fit.fit(again, loader(), loader(), ckpt_path=tmp_path / "a.ckpt")


class Inside(Module):
    """Compiles its network itself."""

    def __init__(self) -> None:
        super().__init__()
        self.network = torch.compile(self.network, backend="eager")


@pytest.mark.parametrize("method", [LoRA(r=2), Freeze(layers=0, patterns="fc2")])
def test_a_compiled_module_trains_as_an_eager_one_and_exchanges_checkpoints(
    method: Any, tmp_path: Path
) -> None:
    found = []
    for kind in ("eager", "outside", "inside"):
        seed_everything(1, verbose=False)
        module = Inside() if kind == "inside" else Module()
        given = torch.compile(module, backend="eager") if kind == "outside" else module
        run = trainer(tmp_path, PEFT(method), max_epochs=1)
        run.fit(given, loader(), loader())
        run.save_checkpoint(tmp_path / f"{kind}.ckpt")
        found.append(torch.load(tmp_path / f"{kind}.ckpt", weights_only=True)["state_dict"])
    for state in found[1:]:
        assert state.keys() == found[0].keys()
        assert all(torch.allclose(state[name], found[0][name], atol=1e-6) for name in state)
    for kind, cls in {"inside": Module, "eager": Inside}.items():
        fit = trainer(tmp_path, PEFT(method))
        fit.validate(cls(), loader(), ckpt_path=tmp_path / f"{kind}.ckpt", verbose=False)
    module.peft_adapter.remove()
    assert changed(snapshot(network()), module.network._orig_mod) == set()


def test_early_stopping_fast_runs_and_profilers(tmp_path: Path) -> None:
    stop = EarlyStopping("val/loss", min_delta=100.0, patience=1)
    run = trainer(tmp_path, PEFT(LoRA(r=2)), stop, max_epochs=9)
    run.fit(Module(), loader(), loader())
    assert run.current_epoch == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(tmp_path, PEFT(LoRA(r=2)), fast_dev_run=True).fit(Module(), loader(), loader())
        trainer(tmp_path, PEFT(LoRA(r=2)), barebones=True).fit(Module(), loader(), loader())
    settings = {"profiler": "simple", "gradient_clip_val": 0.1, "num_sanity_val_steps": 1}
    trainer(tmp_path, PEFT(LoRA(r=2)), **settings).fit(Module(), loader(), loader())


# the folder at the end


@pytest.mark.parametrize(
    ("place", "wanted"), [(None, "adapter"), ("checkpoints", "adapter"), ("mine", "mine/adapter")]
)
def test_a_fit_ends_with_a_folder_that_gives_the_same_outputs(
    place: str | None, wanted: str, tmp_path: Path
) -> None:
    module = Module()
    keep = ModelCheckpoint(tmp_path / place if place else None)
    run = trainer(tmp_path, PEFT(LoRA(r=2)), keep, enable_checkpointing=True)
    run.fit(module, loader(), loader())
    assert {path.name for path in (tmp_path / wanted).iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "lightning_peft.json",
    }
    fresh = Module()
    load_adapter(fresh, tmp_path / wanted)
    x = torch.randn(3, 8)
    assert torch.equal(fresh.eval()(x), module.eval()(x))


@pytest.mark.parametrize(
    "settings", [{"fast_dev_run": True}, {"enable_checkpointing": False}, {"max_epochs": 0}]
)
def test_no_folder_is_left_where_no_checkpoint_is(settings: dict[str, Any], tmp_path: Path) -> None:
    quiet = {"enable_checkpointing": True, **settings}
    trainer(tmp_path, PEFT(LoRA(r=2)), **quiet).fit(Module(), loader(), loader())
    assert list(tmp_path.rglob("adapter")) == []


def test_the_folder_can_be_left_out(tmp_path: Path) -> None:
    module = Module()
    module.peft_export = False
    trainer(tmp_path, PEFT(LoRA(r=2)), enable_checkpointing=True).fit(module, loader(), loader())
    assert list(tmp_path.rglob("adapter")) == []
    assert list(tmp_path.rglob("*.ckpt"))


# cost


def test_a_step_walks_over_no_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, walks = Module(), 0
    original = nn.Module.named_modules

    def counted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal walks
        callers = [sys._getframe(depth).f_code.co_filename for depth in range(1, 4)]
        walks += any("lightning_peft" in name for name in callers)
        return original(self, *args, **kwargs)

    seen: list[int] = []
    note = At("on_train_batch_end", lambda *_: seen.append(walks))
    monkeypatch.setattr(nn.Module, "named_modules", counted)
    trainer(tmp_path, PEFT(LoRA(r=2)), note, max_epochs=1).fit(module, loader(), loader())
    assert len(seen) == 6
    assert seen[0] == seen[-1] > 0
