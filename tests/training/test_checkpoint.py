"""Checkpoints hold what was trained and no more, refuse what does not fit, and resume exactly."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import StepLR

from lightning_peft import PEFT, Freeze, LoRA, last_checkpoint
from lightning_peft.errors import CheckpointError
from lightning_peft.methods import FullFineTuning
from lightning_peft.training.checkpoint import RECORD, REMEDY
from tests.lightning_modules import (
    Around,
    At,
    Module,
    changed,
    loader,
    repeated,
    snapshot,
    trainer,
)

FC1_A = "network.fc1.lightning_peft.default_lora.lora_A"


def fitted(
    folder: Path, module: Module | None = None, epochs: int = 1, **settings: Any
) -> tuple[Module, Path]:
    """Return a trained module and its checkpoint."""
    torch.manual_seed(0)
    module = module or Module()
    run = trainer(folder, PEFT(LoRA(r=2), **settings), max_epochs=epochs)
    run.fit(module, loader(), loader())
    run.save_checkpoint(folder / "a.ckpt")
    return module, folder / "a.ckpt"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a `Module` with LoRA of rank 2."""
    return fitted(tmp_path_factory.mktemp("fitted"))[1]


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


class Wide(Around):
    """One wide layer and AdamW, so that the trained bytes are many."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 512)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(batch["x"]).pow(2).mean()

    validation_step = training_step


def test_a_checkpoint_with_adam_takes_three_times_what_is_trained(tmp_path: Path) -> None:
    module = Wide()
    run = trainer(tmp_path, PEFT(LoRA(r=64)), max_epochs=1)
    data = repeated({"x": torch.randn(4, 512)})
    run.fit(module, data, data)
    run.save_checkpoint(tmp_path / "a.ckpt")
    bytes_ = sum(p.numel() * 4 for p in module.parameters() if p.requires_grad)
    assert 3 * bytes_ < (tmp_path / "a.ckpt").stat().st_size <= 3.2 * bytes_ + 64_000


def test_it_holds_what_was_trained_and_what_changed(tmp_path: Path) -> None:
    class Counting(Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(2))
            self.register_buffer("same", torch.zeros(2))
            self.register_buffer("scratch", torch.zeros(2), persistent=False)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.seen += len(batch[0])
            self.scratch += 1
            return self.loss(batch)

    module, path = fitted(tmp_path, Counting(), train="network.norm")
    found = read(path)
    norm = {f"network.norm.{n}" for n in ("weight", "bias", "running_mean", "running_var")}
    norm |= {"network.norm.num_batches_tracked"}
    deltas = {
        f"network.{host}.lightning_peft.default_lora.lora_{ab}"
        for host in ("fc1", "fc2", "head")
        for ab in "AB"
    }
    assert set(found["state_dict"]) == deltas | norm | {"seen", REMEDY}
    again = Counting()
    trainer(tmp_path, PEFT(LoRA(r=2), train="network.norm"), max_epochs=1).fit(
        again, loader(), loader(), ckpt_path=path
    )
    assert changed(snapshot(module), again) == set()
    assert again.seen[0] == 24


def test_a_strict_load_without_the_callback_names_the_remedy(
    checkpoint: Path, tmp_path: Path
) -> None:
    path = checkpoint
    with pytest.raises(RuntimeError, match=r"lightning_peft.PEFT.load_from_checkpoint\(YourModule"):
        Module.load_from_checkpoint(path)
    with pytest.raises(RuntimeError, match="or add the PEFT callback"):
        trainer(tmp_path).fit(Module(), loader(), loader(), ckpt_path=path)
    with pytest.raises(RuntimeError, match="or add the PEFT callback"):
        trainer(tmp_path).validate(Module(), loader(), ckpt_path=path)


def _without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda file: file["state_dict"].pop(name)


def _with(name: str, value: Tensor) -> Callable[[dict[str, Any]], Any]:
    return lambda file: file["state_dict"].update({name: value})


NAN = torch.full((2, 8), float("nan"))
DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing": (_without(FC1_A), rf"`{FC1_A}` is missing in the checkpoint"),
    "extra": (_with("network.fc9.weight", torch.ones(1)), r"`network.fc9.weight` is unexpected"),
    "base": (_with("network.fc1.weight", torch.ones(16, 8)), r"`network.fc1.weight` is unexpected"),
    "shape": (_with(FC1_A, torch.ones(3, 8)), rf"`{FC1_A}` must have shape \(2, 8\)"),
    "kind": (_with(FC1_A, torch.ones(2, 8).int()), rf"`{FC1_A}` must be torch.float32"),
    "nan": (_with(FC1_A, NAN), rf"`{FC1_A}` holds NaN"),
    "buffer": (_with("network.norm.running_mean", torch.ones(3)), "running_mean` must have shape"),
    "empty": (lambda file: file["state_dict"].clear(), "is missing in the checkpoint"),
    "version": (lambda file: file[RECORD].update(version=9), "version must be 1, but is 9"),
    "groups": (
        lambda file: file[RECORD].update(optimizers=[[["a"], ["b"]]]),
        r"same groups as when the checkpoint was saved \(1, 1 a group\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_a_damaged_checkpoint_is_refused_and_changes_nothing(
    damage: str, stage: str, checkpoint: Path, tmp_path: Path
) -> None:
    module = Module()
    file, (spoil, message) = read(checkpoint), DAMAGE[damage]
    spoil(file)
    torch.save(file, tmp_path / "bad.ckpt")
    before = snapshot(module)
    run = trainer(tmp_path, PEFT(LoRA(r=2)))
    if stage == "fit":
        with pytest.raises(CheckpointError, match=message):
            run.fit(module, loader(), loader(), ckpt_path=tmp_path / "bad.ckpt")
    elif damage != "groups":
        with pytest.raises(CheckpointError, match=message):
            run.validate(module, loader(), ckpt_path=tmp_path / "bad.ckpt")
    assert changed(before, module) == set()
    assert not any(p.any() for n, p in module.named_parameters() if n.endswith("lora_B"))


class Other(Module):
    """The same network with other weights."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.normal_(self.network.fc2.weight)


class Regrouped(Module):
    def configure_optimizers(self) -> Any:
        first, *others = (p for p in self.parameters() if p.requires_grad)
        return AdamW([{"params": [first]}, {"params": others}], lr=0.05)


@pytest.mark.parametrize(
    ("cls", "peft", "message"),
    [
        (Other, PEFT(LoRA(r=2)), "trained on another base"),
        (Module, PEFT(LoRA(r=2, alpha=1)), r"`alpha` = 16, but here it is 1"),
        (Module, PEFT(LoRA(r=2, dropout=0.5)), r"`dropout` = 0.0, but here it is 0.5"),
        (Module, PEFT(LoRA(r=2, targets="fc1")), r"`targets` = None, but here it is 'fc1'"),
        (Module, PEFT(Freeze(layers=0, patterns="fc1")), r"trained with `_target_`"),
        (Module, PEFT([LoRA(r=2), Freeze(layers=0, patterns="norm")]), r"trained with `methods`"),
        (Module, PEFT(LoRA(r=2), name="b"), r"`name` = 'default', but here it is 'b'"),
        (Module, PEFT(LoRA(r=2), train="network.norm"), r"`train` = \[\], but here it is"),
        (Regrouped, PEFT(LoRA(r=2)), r"same groups as when .* \(6 a group\), but hold 1, 5"),
    ],
)
def test_what_the_checkpoint_was_not_trained_with_is_refused(
    cls: type[Module], peft: PEFT, message: str, checkpoint: Path, tmp_path: Path
) -> None:
    module, path = cls(), checkpoint
    before = snapshot(module)
    with pytest.raises(CheckpointError, match=message):
        trainer(tmp_path, peft).fit(module, loader(), loader(), ckpt_path=path)
    assert changed(before, module) == set()
    assert not any(p.any() for n, p in module.named_parameters() if n.endswith("lora_B"))


def test_a_full_checkpoint_of_the_base_still_loads(tmp_path: Path) -> None:
    base = Other()
    run = trainer(tmp_path, max_epochs=1)
    run.fit(base, loader(), loader())
    run.save_checkpoint(tmp_path / "base.ckpt")
    module = Module()
    trainer(tmp_path, PEFT(LoRA(r=2))).validate(module, loader(), ckpt_path=tmp_path / "base.ckpt")
    assert changed(snapshot(base), module) == set()
    module.load_state_dict(snapshot(module))
    missing = snapshot(module)
    del missing["network.fc2.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*network.fc2.bias"):
        module.load_state_dict(missing)


class Stubborn(Module):
    """Overrides what we build on, in the forms that Lightning allows."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        full = super().state_dict(*args, **kwargs)
        return {name: tensor for name, tensor in full.items() if "lora_A" in name}

    def load_state_dict(self, state_dict: Any, strict: bool = True) -> None:  # type: ignore[override]
        super().load_state_dict(state_dict, strict=strict)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = {"lr": self.lr}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.found = checkpoint["mine"]


def test_a_module_with_hooks_of_its_own_is_saved_and_loaded(tmp_path: Path) -> None:
    module, path = fitted(tmp_path, Stubborn())
    loaded = PEFT.load_from_checkpoint(Stubborn, path)
    assert loaded.found == {"lr": 0.05}
    trained = dict(module.named_parameters())
    assert len(read(path)["state_dict"]) == 7
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, trained[name])


def test_a_weights_only_checkpoint_serves_for_everything_but_a_resume(tmp_path: Path) -> None:
    module = Module()
    best = ModelCheckpoint(tmp_path / "best", filename="b", save_weights_only=True)
    run = trainer(tmp_path, PEFT(LoRA(r=2)), best, enable_checkpointing=True)
    run.fit(module, loader(), loader())
    path = tmp_path / "best" / "b.ckpt"
    assert FC1_A in read(path)["state_dict"]
    assert len(read(path)["state_dict"]) == 7
    wanted = run.validate(module, loader(), verbose=False)
    assert run.validate(module, loader(), ckpt_path="best", verbose=False) == wanted
    fresh = Module()
    again = trainer(tmp_path, PEFT(LoRA(r=2)))
    assert again.validate(fresh, loader(), ckpt_path=path, verbose=False) == wanted
    assert again.test(Module(), loader(), ckpt_path=path, verbose=False)[0]
    assert changed(snapshot(module), PEFT.load_from_checkpoint(Module, path)) == set()


class Drawing(Module):
    """Uses every random generator, and steps a schedule."""

    def __init__(self, schedule: str = "step") -> None:
        super().__init__()
        self.schedule = schedule
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        noise = random.random() + float(np.random.rand()) + torch.rand(1)
        loss = self.loss(batch) * (1 + noise.squeeze())
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch) * torch.rand(1).squeeze())

    def configure_optimizers(self) -> Any:
        optimizer = AdamW(self.parameters(), lr=0.05)
        every = {"scheduler": StepLR(optimizer, 2, 0.7), "interval": self.schedule}
        return [optimizer], [every]


class Killed(Exception):
    pass


def _stop_after(epoch: int) -> At:
    def stop(run: Any, module: Any) -> None:
        if run.current_epoch == epoch:
            raise Killed

    return At("on_train_epoch_start", stop)


def _run(folder: Path, schedule: str, workers: int, stop: int | None, at_end: Any) -> Drawing:
    """Train for four epochs, from the newest checkpoint in `folder` if there is one."""
    fresh = not folder.exists()
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(5 if fresh else 6)
    module = Drawing(schedule)
    last = ModelCheckpoint(folder, save_top_k=-1, save_on_train_epoch_end=at_end)
    callbacks = [PEFT(LoRA(r=2, dropout=0.3), train="network.norm"), last]
    if stop is not None:
        callbacks.append(_stop_after(stop))
    run = trainer(
        folder, *callbacks, max_epochs=4, enable_checkpointing=True,
        accumulate_grad_batches=4,
    )  # fmt: skip
    shuffled = loader(22, shuffle=True, num_workers=workers)
    path = None if fresh else last_checkpoint(folder)
    try:
        run.fit(module, shuffled, loader(), ckpt_path=path)
    except Killed:
        assert stop is not None
    return module


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
@pytest.mark.parametrize(
    ("schedule", "workers", "at_end"),
    [("step", 0, None), ("epoch", 2, None), ("step", 2, False), ("epoch", 0, False)],
)
def test_resumed_equals_uninterrupted(
    schedule: str, workers: int, at_end: bool | None, tmp_path: Path
) -> None:
    # Checkpoints are written at the end of the training epoch, or already at that of validation.
    whole = _run(tmp_path / "whole", schedule, workers, None, at_end)
    _run(tmp_path / "parts", schedule, workers, 2, at_end)
    resumed = _run(tmp_path / "parts", schedule, workers, None, at_end)
    assert resumed.losses == whole.losses[-len(resumed.losses) :]
    assert len(resumed.losses) == 2 * 6
    assert changed(snapshot(whole), resumed) == set()
    rates = [
        group["lr"] for m in (whole, resumed) for group in m.trainer.optimizers[0].param_groups
    ]
    assert rates[0] == rates[1] < 0.05
    states = [m.trainer.optimizers[0].state.values() for m in (whole, resumed)]
    for one, other in zip(*states, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("method", [FullFineTuning(), Freeze(layers=0, patterns=["fc2", "norm"])])
def test_what_is_trained_in_place_resumes_exactly(method: Any, tmp_path: Path) -> None:
    def run(epochs: int, path: Path | None) -> Module:
        torch.manual_seed(0)
        module = Module()
        fit = trainer(tmp_path, PEFT(method), max_epochs=epochs)
        fit.fit(module, loader(shuffle=True), loader(), ckpt_path=path)
        fit.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module

    run(1, None)
    whole = run(3, None)
    resumed = run(3, tmp_path / "1.ckpt")
    assert changed(snapshot(whole), resumed) == set()
    assert torch.equal(whole.network.norm.running_var, resumed.network.norm.running_var)


def test_a_run_that_is_killed_leaves_a_checkpoint_of_the_last_good_step(tmp_path: Path) -> None:
    def stop(run: Any, module: Any) -> None:
        if run.global_step == 3:
            raise Killed

    module = Module()
    last = ModelCheckpoint(tmp_path / "c", save_on_exception=True)
    callbacks = [PEFT(LoRA(r=2)), last, At("on_train_batch_end", stop)]
    run = trainer(tmp_path, *callbacks, enable_checkpointing=True)
    with pytest.raises(Killed):
        run.fit(module, loader(), loader())
    found = read(last_checkpoint(tmp_path / "c"))
    assert found["global_step"] == 3
    assert torch.equal(found["state_dict"][FC1_A], module.state_dict()[FC1_A])


def test_the_record_of_a_validated_checkpoint_is_forgotten_by_a_later_fit(
    checkpoint: Path, tmp_path: Path
) -> None:
    path = checkpoint
    module = Regrouped()
    run = trainer(tmp_path, PEFT(LoRA(r=2)))
    run.validate(module, loader(), ckpt_path=path, verbose=False)
    state = torch.get_rng_state()
    run.fit(module, loader(), loader())  # other groups, and its own random numbers
    assert not torch.equal(torch.get_rng_state(), state)


def test_a_resumed_module_that_is_trained_again_starts_anew(
    checkpoint: Path, tmp_path: Path
) -> None:
    path = checkpoint
    module = Module()
    run = trainer(tmp_path, PEFT(LoRA(r=2)))
    run.fit(module, loader(), loader(), ckpt_path=path)
    torch.manual_seed(123)
    seen: list[Tensor] = []
    note = At("on_train_start", lambda *_: seen.append(torch.get_rng_state()))
    trainer(tmp_path, PEFT(LoRA(r=2)), note).fit(module, loader(), loader())
    assert not torch.equal(seen[0], read(path)[RECORD]["random"][0]["torch"])


def test_more_epochs_than_planned_can_be_trained(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint
    module = Module()
    before = read(path)["state_dict"][FC1_A]
    trainer(tmp_path, PEFT(LoRA(r=2)), max_epochs=3).fit(module, loader(), loader(), ckpt_path=path)
    assert module.trainer.current_epoch == 3
    assert not torch.equal(before, module.state_dict()[FC1_A])


def test_another_number_of_processes_resumes_without_random_states(
    checkpoint: Path, tmp_path: Path
) -> None:
    path = checkpoint
    file = read(path)
    file[RECORD]["random"] *= 2
    torch.save(file, tmp_path / "two.ckpt")
    run = trainer(tmp_path, PEFT(LoRA(r=2)))
    run.fit(Module(), loader(), loader(), ckpt_path=tmp_path / "two.ckpt")


def test_optimizers_keep_their_own_order_over_a_resume(tmp_path: Path) -> None:
    class Reversed(Module):
        def configure_optimizers(self) -> Any:
            return SGD(list(self.parameters())[::-1], lr=0.05, momentum=0.9)

    class Straight(Module):
        def configure_optimizers(self) -> Any:
            return SGD(self.parameters(), lr=0.05, momentum=0.9)

    found = []
    for cls in (Straight, Reversed):
        _, path = fitted(tmp_path, cls())
        module = Straight()
        run = trainer(tmp_path, PEFT(LoRA(r=2)))
        run.fit(module, loader(), loader(), ckpt_path=path)
        found.append(snapshot(module))
    assert changed(found[0], module) == set()
