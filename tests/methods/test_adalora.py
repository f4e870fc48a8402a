"""AdaLoRA: peft's forward pass, budget and masks, in a loop and under a Trainer."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import PEFT, inject
from lightning_peft.errors import ConfigError
from lightning_peft.methods import AdaLoRA
from lightning_peft.training.steps import after_step, before_step
from tests.lightning_modules import At, Module, changed, loader, snapshot, trainer

peft = pytest.importorskip("peft", reason="peft is not installed: run `pip install '.[dev]'`")

Build = Callable[[str], Any]

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    # what peft 0.21 asks of transformers 5.23
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

STEPS = 16
SHORT: dict[str, Any] = {"r": 2, "init_r": 4, "warmup": 0.125, "final": 0.25, "every": 3}


def triplets(adapter: Any) -> list[Any]:
    return [delta for _, _, delta in adapter.deltas]


@pytest.mark.parametrize(
    ("name", "targets"), [("bert", ["query", "dense"]), ("llama", ["q_proj", "up_proj"])]
)
def test_a_short_run_equals_pefts(name: str, targets: list[str], build: Build) -> None:
    example = build(name)
    model = example.model.double()
    targets = [t if t != "dense" else "attention.output.dense" for t in targets]
    config = peft.AdaLoraConfig(
        target_r=2, init_r=4, lora_alpha=6, target_modules=targets, tinit=2, tfinal=4, deltaT=3,
        total_step=STEPS, orth_reg_weight=0.1,
    )  # fmt: skip
    reference = peft.get_peft_model(copy.deepcopy(model), config).eval()
    adapter = inject(model, AdaLoRA(**SHORT, alpha=6, targets=targets), head=False)
    pairs = matched(reference, adapter)
    labels = torch.tensor([0, 1, 2]) if name == "bert" else example.inputs["input_ids"]
    batch = example.inputs | {"labels": labels}
    ours, theirs = (torch.optim.AdamW([p[i] for p in pairs], lr=0.02) for i in (0, 1))
    left = []
    for step in range(STEPS):
        model(**batch).loss.backward()
        before_step(adapter, step, STEPS)
        ours.step()
        after_step(adapter, ours, step, STEPS)
        ours.zero_grad()
        reference.base_model(**batch).loss.backward()  # which adds the penalty
        theirs.step()
        reference.base_model.update_and_allocate(step)
        theirs.zero_grad()
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
        left.append(sum(int((t.lora_E != 0).sum()) for t in triplets(adapter)))
    assert left[2] == 16
    assert left[12] == left[-1] == 8
    assert all("sensitivity" not in state for state in ours.state.values())


def matched(reference: nn.Module, adapter: Any) -> list[tuple[Any, Any]]:
    """Return our parameters beside peft's, after giving peft's their values."""
    pairs = []
    for host, _, delta in adapter.deltas:
        theirs = reference.get_submodule(f"base_model.model.{host}")
        for factor in ("lora_A", "lora_E", "lora_B"):
            one, other = getattr(delta, factor), getattr(theirs, factor).default
            with torch.no_grad():
                other.copy_(one)
            pairs.append((one, other))
    return pairs


LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(6, 5), torch.randn(2, 3, 6)),
    "embedding": (lambda: nn.Embedding(10, 5), torch.tensor([[1, 2], [3, 4]])),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), torch.randn(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), torch.randn(2, 4, 9, 7)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_loses_ranks_and_merges(kind: str) -> None:
    make, x = LAYERS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(make())
    base = model(x).detach()
    adapter = inject(model, AdaLoRA(**SHORT, targets="0"), head=False)
    assert torch.equal(model(x), base)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    for step in range(STEPS):
        optimizer.zero_grad()
        (model(x) - 1).square().sum().backward()
        before_step(adapter, step, STEPS)
        optimizer.step()
        after_step(adapter, optimizer, step, STEPS)
    (triplet,) = triplets(adapter)
    assert (triplet.lora_E != 0).sum() == 2
    tuned = model(x)
    torch.testing.assert_close(adapter.merge()(x), tuned, rtol=1e-4, atol=1e-5)


def test_the_penalty_keeps_vectors_orthonormal() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    adapter = inject(model, AdaLoRA(r=2, init_r=2, orthogonality=1.0, targets="0"), head=False)
    (triplet,) = triplets(adapter)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.01)
    for step in range(500):
        optimizer.zero_grad()
        before_step(adapter, step, 500)
        optimizer.step()
    own = triplet.lora_A @ triplet.lora_A.T
    torch.testing.assert_close(own, torch.eye(2), rtol=0, atol=0.03)


def test_a_trainer_drives_it_and_a_resume_is_exact(tmp_path: Path) -> None:
    def run(path: Path | None = None) -> Any:
        module = Module()
        save = At("on_train_epoch_end", _save)
        torch.manual_seed(7 if path is None else 8)
        method = AdaLoRA(**(SHORT | {"every": 2}))
        fit = trainer(tmp_path, PEFT(method), save, max_epochs=3)
        fit.fit(module, loader(), loader(), ckpt_path=path)
        return module

    whole = run()
    values = [t.lora_E for t in triplets(whole.peft_adapter)]
    assert sum(int((value != 0).sum()) for value in values) == 2 * len(values)
    for epoch in (0, 1):  # while ranks fall, and while the sensitivities are needed
        resumed = run(tmp_path / f"{epoch}.ckpt")
        assert changed(snapshot(whole), resumed) == set()


def _save(run: Any, module: Any) -> None:
    run.save_checkpoint(f"{run.default_root_dir}/{run.current_epoch}.ckpt")


def test_a_schedule_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="AdaLoRA follows a schedule: `max_steps` or"):
        trainer(tmp_path, PEFT(AdaLoRA()), max_epochs=-1).fit(Module(), loader(), loader())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_r": 4}, "`init_r` must be at least 8, but is 4 instead"),
        ({"warmup": 0.6}, "must be shares that sum to at most 1, but are 0.6 and 0.5"),
        ({"every": 0}, "`every` must be at least 1, but is 0 instead"),
        ({"beta2": 1.0}, r"must lie in \(0, 1\), but one is 1.0 instead"),
        ({"orthogonality": -1.0}, "`orthogonality` must be 0 or more, but is -1.0 instead"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdaLoRA(**settings)


def test_a_module_that_optimizes_by_hand_is_refused(tmp_path: Path) -> None:
    module = Module()
    module.automatic_optimization = False
    with pytest.raises(ConfigError, match="`adalora` follows the number of optimizer steps"):
        trainer(tmp_path, PEFT(AdaLoRA(r=2, init_r=4))).fit(module, loader(), loader())
