"""EVA: A starts from what its layer receives in the first batch, once."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_peft import PEFT, LoRA, inject
from lightning_peft.errors import AdapterError
from lightning_peft.methods import EVA
from lightning_peft.methods.eva import principal_directions
from lightning_peft.training.warm_start import Watch, warm_start
from tests.lightning_modules import Module, changed, loader, snapshot, trainer

peft = pytest.importorskip("peft", reason="peft is not installed: run `pip install '.[dev]'`")

Build = Callable[[str], Any]


def factors(adapter: Any, which: str) -> dict[str, Tensor]:
    named = adapter.named_parameters().items()
    return {
        n.partition(".lightning_peft")[0]: p.detach().clone() for n, p in named if n.endswith(which)
    }


def test_directions_are_the_principal_components_of_the_rows() -> None:
    spread = torch.tensor([5.0, 3.0, 1.0, 0.1, 0.1, 0.1])
    turned = torch.linalg.qr(torch.randn(6, 6)).Q
    rows = torch.randn(400, 6) * spread @ turned + 10
    found = principal_directions(rows, 3)
    exact = torch.linalg.svd(rows - rows.mean(0)).Vh[:3]
    torch.testing.assert_close((found * exact).sum(1).abs(), torch.ones(3), rtol=0, atol=1e-4)
    assert (found.gather(1, found.abs().argmax(1, keepdim=True)) > 0).all()
    assert len(principal_directions(rows[:3], 5)) == 2  # three rows span a plane
    assert len(principal_directions(rows[:1], 5)) == 0


def test_a_pass_starts_each_layer_and_leaves_the_outputs(build: Build) -> None:
    example = build("llama")
    base = example.logits()
    adapter = inject(example.model, EVA(r=3))
    before, seen = factors(adapter, "lora_A"), {}
    for name, host, _ in adapter.deltas:
        host.register_forward_pre_hook(lambda m, args, n=name: seen.setdefault(n, args[0]))
    state = torch.get_rng_state()
    mask = example.inputs["attention_mask"]
    with warm_start(adapter, mask):
        assert torch.equal(example.logits(), base)
    assert torch.equal(torch.get_rng_state(), state)
    for name, start in factors(adapter, "lora_A").items():
        assert not torch.equal(start, before[name])
        expected = principal_directions(seen[name][mask.bool()], 3)
        torch.testing.assert_close(start, expected)
    hooks = [m for m in example.model.modules() if len(m._forward_pre_hooks) > 1]
    assert not hooks


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage")
def test_starts_where_pefts_does(build: Build) -> None:
    from peft.tuners.lora.eva import initialize_lora_eva_weights

    example = build("llama")
    ids = torch.randint(3, 64, (16, 24), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=1.0), task_type="CAUSAL_LM",
    )  # fmt: skip
    reference = peft.get_peft_model(copy.deepcopy(example.model), config)
    initialize_lora_eva_weights(reference, [batch], show_progress_bar=False)
    adapter = inject(example.model, EVA(r=4, alpha=8, targets=["q_proj", "down_proj"]), head=False)
    inputs: dict[str, Tensor] = {}
    for name, host, _ in adapter.deltas:
        host.register_forward_pre_hook(lambda m, args, n=name: inputs.setdefault(n, args[0]))
    with torch.no_grad(), warm_start(adapter):
        example.model(**batch)
    theirs = dict(reference.base_model.model.named_modules())
    for name, start in factors(adapter, "lora_A").items():
        wanted, x = theirs[name].lora_A["default"].weight.detach(), inputs[name].flatten(0, 1)
        explained = [(x @ a.T).var(0).sum() for a in (start, wanted)]
        assert explained[0] > 0.999 * explained[1] > 0.98 * explained[0]  # theirs is coarser
        torch.testing.assert_close(start @ start.T, wanted @ wanted.T, rtol=0, atol=1e-5)


def test_what_is_trained_already_stays(build: Build) -> None:
    example = build("bert")
    adapter = inject(example.model, EVA())
    example.train(adapter.parameters())
    before = factors(adapter, "lora_A")
    with warm_start(adapter):
        example.logits()
    assert all(torch.equal(start, before[n]) for n, start in factors(adapter, "lora_A").items())


def test_what_no_forward_pass_calls_is_refused(build: Build) -> None:
    adapter = inject(build("bert").model, EVA())
    called = pytest.raises(AdapterError, match="No module that the adapter changes was called")
    with called, warm_start(adapter):
        pass


@pytest.mark.parametrize("name", ["tagger", "resnet", "t5"])
def test_hosts_without_a_matrix_of_their_own_start_as_in_lora(name: str, build: Build) -> None:
    example = build(name)
    adapter = inject(example.model.train(), EVA())
    with warm_start(adapter):
        output = example.logits()
    assert torch.isfinite(output).all()
    assert all(torch.isfinite(p).all() for p in adapter.parameters())


def test_a_fit_starts_from_its_first_batch_and_resumes_exactly(tmp_path: Path) -> None:
    def run(epochs: int, path: Path | None = None) -> Any:
        module = Module()
        torch.manual_seed(7 if path is None else 8)
        fit = trainer(tmp_path, PEFT(EVA(r=2)), max_epochs=epochs)
        fit.fit(module, loader(), loader(), ckpt_path=path)
        fit.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module

    whole = snapshot(run(2))
    first = run(1)
    assert not first.peft_adapter.model._forward_pre_hooks
    assert changed(whole, run(2, tmp_path / "1.ckpt")) == set()
    watched = Watch(first.peft_adapter)
    assert watched.deltas
    watched.close()


def test_a_fit_draws_the_batches_that_it_would_have_drawn(tmp_path: Path) -> None:
    def drawn(method: Any) -> list[Tensor]:
        module, batches = Module(), []
        forward = module.forward
        module.forward = lambda x: batches.append(x) or forward(x)
        torch.manual_seed(3)
        trainer(tmp_path, PEFT(method), max_epochs=1).fit(module, loader(), loader())
        return batches

    pairs = zip(drawn(EVA(r=2)), drawn(LoRA(r=2)), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
