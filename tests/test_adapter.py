"""The handle: state, switching, merging, removal, several adapters on one base."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import Freeze, LoRA, inject
from lightning_peft.carrying.registry import adapters_of
from lightning_peft.carrying.state import check_state
from lightning_peft.delta import SLOT, NotMergeable, slot_of
from lightning_peft.errors import AdapterError, TargetError
from lightning_peft.methods import FullFineTuning

Build = Callable[[str], Any]


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def modes(model: nn.Module) -> dict[str, tuple[type, bool]]:
    return {name: (type(module), module.training) for name, module in model.named_modules()}


def clones(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def randomise(adapter: Any) -> None:
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.1)


def test_names_the_trained_parameters_as_the_model_does(build: Build) -> None:
    model = build("bert").model
    adapter = inject(model, LoRA(r=2, targets="query"), "mine")
    root = f"bert.encoder.layer.0.attention.self.query.{SLOT}.mine_lora"
    assert list(adapter.named_parameters())[:2] == [f"{root}.lora_A", f"{root}.lora_B"]
    assert list(adapter.named_parameters())[-2:] == ["classifier.bias", "classifier.weight"]
    assert adapter.num_parameters == 2 * 2 * (32 * 2 + 32 * 2) // 2 + 3 * 33
    assert adapter.num_bytes == 4 * adapter.num_parameters
    assert repr(adapter).startswith("Adapter('mine', [LoRA(r=2,")
    assert adapters_of(model) == {"mine": adapter}
    assert adapters_of(nn.ModuleList([model])) == {"mine": adapter}


def test_adapts_a_module_that_is_a_layer_itself() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    before = layer(x)
    adapter = inject(layer, LoRA(r=2))
    assert list(adapter.named_parameters()) == [
        f"{SLOT}.default_lora.lora_A",
        f"{SLOT}.default_lora.lora_B",
    ]
    randomise(adapter)
    assert not torch.allclose(layer(x), before)
    layer.load_state_dict(layer.state_dict())
    assert adapter.remove() is layer
    assert torch.equal(layer(x), before)
    assert type(layer) is nn.Linear


@pytest.mark.parametrize("action", ["remove", "merge", "disabled", "forget", "state_dict", "save"])
def test_an_adapter_that_was_taken_out_says_so(action: str, build: Build, tmp_path: Any) -> None:
    model = build("mlp").model
    adapter = inject(model, LoRA(targets="fc1"))
    adapter.remove()
    call = adapter.disabled().__enter__ if action == "disabled" else getattr(adapter, action)
    with pytest.raises(AdapterError, match="no longer"):
        call(*[tmp_path] * (action == "save"))


@pytest.mark.parametrize("name", ["", "a.b", "a b", "ä/ö"])
def test_a_name_must_fit_into_a_state_dict_key(name: str, build: Build) -> None:
    with pytest.raises(AdapterError, match="`name` must be letters"):
        inject(build("mlp").model, LoRA(targets="fc1"), name)


def test_a_refused_injection_leaves_the_model_as_it_was(build: Build) -> None:
    model = build("cnn").model.train()
    model.conv_stem.weight.requires_grad_(False)
    before = flags(model), modes(model), list(model.state_dict())
    refused: list[tuple[Any, dict[str, Any]]] = [
        ([LoRA(targets="conv_pw"), LoRA(targets="conv_p*")], {}),
        (LoRA(targets="nothing"), {}),
        (LoRA(targets="conv_pw"), {"train": "nothing"}),
        ([LoRA(targets="conv_pw"), Freeze(layers=99)], {}),
    ]
    for methods, settings in refused:
        with pytest.raises((AdapterError, TargetError)):
            inject(model, methods, **settings)
        assert (flags(model), modes(model), list(model.state_dict())) == before
        assert adapters_of(model) == {}


def test_two_methods_at_once_are_trained_together(build: Build) -> None:
    example = build("bert")
    base = example.logits()
    adapter = inject(example.model, [LoRA(r=2, targets="query"), Freeze(layers=1)])
    names = set(adapter.named_parameters())
    assert "bert.encoder.layer.1.output.dense.weight" in names
    assert f"bert.encoder.layer.0.attention.self.query.{SLOT}.default_lora.lora_A" in names
    example.train(adapter.parameters())
    assert not torch.allclose(example.logits(), base)
    with adapter.disabled():
        assert torch.equal(example.logits(), base)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("name", ["cnn", "bert"])
def test_two_adapters_come_and_go_in_any_order(name: str, first: int, build: Build) -> None:
    example = build(name)
    example.model.train()
    for i, parameter in enumerate(example.model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    before = flags(example.model), modes(example.model), clones(example.model)
    example.model.eval()
    base = example.logits()
    one = inject(example.model, LoRA(r=2), "one")
    randomise(one)
    with_one = example.logits()
    two = inject(example.model, LoRA(r=3), "two")
    assert torch.equal(example.logits(), base)  # what came last acts alone
    randomise(two)
    with_two, adapters = example.logits(), [one, two]
    with one.disabled(), two.disabled():
        assert torch.equal(example.logits(), base)
    assert torch.equal(example.logits(), with_two)
    adapters.pop(first).remove()
    left = adapters[0]
    assert left.active
    assert torch.equal(example.logits(), with_two if left is two else with_one)
    still = [p for p in example.model.parameters() if p.requires_grad]
    assert set(map(id, still)) == set(map(id, left.parameters()))
    example.model.train()
    assert all(not m.training for m in example.model.modules() if isinstance(m, nn.BatchNorm2d))
    example.model.eval()
    with left.disabled():
        assert torch.equal(example.logits(), base)
    left.remove()
    example.model.train()
    assert (flags(example.model), modes(example.model)) == before[:2]
    assert all(torch.equal(t, before[2][n]) for n, t in example.model.state_dict().items())


def test_state_dict_is_detached_and_shares_storage(build: Build) -> None:
    adapter = inject(build("bert").model, LoRA())
    state = adapter.state_dict()
    assert not any(tensor.requires_grad for tensor in state.values())
    parameters = adapter.named_parameters()
    assert all(state[n].data_ptr() == p.data_ptr() for n, p in parameters.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(next(iter(s))), "is missing in adapter `default` .1 in all."),
        (lambda s: s.update(other=torch.ones(1)), "`other` is unexpected"),
        (lambda s: s.update({"head.bias": torch.ones(4)}), r"must have shape \(3,\), but has \(4,"),
        (lambda s: s.update({"head.bias": torch.full((3,), torch.nan)}), "holds NaN"),
        (lambda s: s.update({"head.bias": torch.full((3,), -torch.inf)}), "or infinite"),
        (lambda s: s.update({"head.bias": torch.ones(3).long()}), "must be torch.float32"),
        (lambda s: s.update({"head.bias": [0.0] * 3}), "must be a tensor, but is list"),
    ],
)
def test_a_wrong_state_is_refused_whole(change: Any, message: str, build: Build) -> None:
    adapter = inject(build("mlp").model, LoRA())
    before = clones(adapter.model)
    state = {name: torch.ones_like(tensor) for name, tensor in adapter.state_dict().items()}
    change(state)
    with pytest.raises(AdapterError, match=message):
        adapter.load_state_dict(state)
    assert all(torch.equal(t, before[n]) for n, t in adapter.model.state_dict().items())


def test_a_misspelt_key_names_the_one_that_is_missing() -> None:
    with pytest.raises(AdapterError, match=r"Did you mean `layer\.lora_A`"):
        check_state({"layer.lora_A": torch.ones(1)}, {"layer.lora_a": torch.ones(1)}, "a file")


def test_a_state_that_lacks_part_of_an_adapter_does_not_load(build: Build) -> None:
    model = build("bert").model
    inject(model, LoRA(), "one")
    inject(model, LoRA(), "two", head=False)
    parent = nn.ModuleDict({"inner": model})
    state = parent.state_dict()
    only_one = {k: t for k, t in state.items() if "two_lora" not in k}
    parent.load_state_dict(only_one)
    lost = next(key for key in only_one if key.endswith("one_lora.lora_B"))
    del only_one[lost]
    with pytest.raises(RuntimeError, match=rf"Missing key\(s\) in state_dict: \"{lost}\"\."):
        parent.load_state_dict(only_one)
    assert parent.load_state_dict(only_one, strict=False).missing_keys == [lost]
    with pytest.raises(RuntimeError, match="Unexpected key"):
        parent.load_state_dict(state | {f"inner.{SLOT}.three_lora.lora_A": torch.ones(1)})


def test_the_base_stays_strict(build: Build) -> None:
    example = build("bert")
    inject(example.model, LoRA())
    state = build("bert").model.state_dict()
    del state["bert.encoder.layer.0.attention.self.query.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*query\.weight"):
        example.model.load_state_dict(state)


def test_odd_bits_of_the_base_survive() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    odd = torch.tensor([-0.0, 0.0, torch.nan, -torch.inf])
    model[0].bias.data = odd.clone()
    model[1].bias.data = odd.clone()
    adapter = inject(model, LoRA(targets="0"), train="1.bias", head=False)
    with torch.no_grad():
        model[1].bias.fill_(1.0)
    with adapter.disabled():
        assert model[1].bias.view(torch.int32).tolist() == odd.view(torch.int32).tolist()
    adapter.remove()
    for layer in model:
        assert layer.bias.view(torch.int32).tolist() == odd.view(torch.int32).tolist()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_injection_in_a_context_without_gradients_can_be_trained(
    context: Any, build: Build
) -> None:
    example = build("bert")
    with context():
        adapter = inject(example.model, LoRA())
    assert not any(parameter.is_inference() for parameter in adapter.parameters())
    base = example.logits()
    example.train(adapter.parameters())
    assert not torch.allclose(example.logits(), base)
    with context(), adapter.disabled():
        assert torch.equal(example.output(), base)
    example.train(adapter.parameters())


@pytest.mark.parametrize("name", ["cnn", "resnet"])
def test_frozen_batch_norm_keeps_its_statistics_in_training(name: str, build: Build) -> None:
    example = build(name)
    example.model.train()
    before = clones(example.model)
    adapter = inject(example.model, LoRA(r=2))
    example.model.train()
    example.train(adapter.parameters(), steps=3)
    trained = set(adapter.state_dict())
    state = example.model.state_dict()
    assert any(name.endswith("running_mean") for name in before)
    assert all(torch.equal(state[n], t) for n, t in before.items() if n not in trained)
    adapter.remove()
    assert all(m.training for m in example.model.modules())


def test_batch_norm_trained_in_place_keeps_learning_its_statistics(build: Build) -> None:
    example = build("cnn")
    before = clones(example.model)
    adapter = inject(example.model, LoRA(r=2, targets="conv_pw"), train="blocks.1.*.bn3")
    assert "blocks.1.0.bn3.running_mean" in adapter.state_dict()
    assert "blocks.1.0.bn3.num_batches_tracked" in adapter.state_dict()
    example.model.train()
    example.train(adapter.parameters())
    state = clones(example.model)
    assert not torch.equal(
        state["blocks.1.0.bn3.running_mean"], before["blocks.1.0.bn3.running_mean"]
    )
    assert torch.equal(state["blocks.0.0.bn3.running_mean"], before["blocks.0.0.bn3.running_mean"])
    example.model.eval()
    tuned = example.logits()
    with adapter.disabled():
        assert torch.equal(example.logits(), example.logits(build("cnn").model))
        state_dict = example.model.state_dict()
        assert all(torch.equal(state_dict[n], t) for n, t in before.items())
    assert torch.equal(example.logits(), tuned)


def test_a_cast_after_the_injection_keeps_masters_and_the_way_back(build: Build) -> None:
    example = build("bert")
    adapter = inject(example.model, LoRA())
    example.train(adapter.parameters())
    example.model.to(torch.bfloat16)
    deltas = [p for n, p in adapter.named_parameters().items() if SLOT in n]
    assert {p.dtype for p in deltas} == {torch.float32}
    assert example.logits().dtype == torch.bfloat16
    example.train(adapter.parameters())
    expected = build("bert").model.to(torch.bfloat16)
    with adapter.disabled():
        assert torch.equal(example.logits(), example.logits(expected))
    adapter.remove()
    state = example.model.state_dict()
    assert all(torch.equal(state[n], t) for n, t in expected.state_dict().items())


def test_a_model_built_on_meta_is_filled_later(build: Build) -> None:
    source, example = build("bert"), build("bert")
    model = copy.deepcopy(example.model).to("meta")
    adapter = inject(model, LoRA())
    model.to_empty(device="cpu")
    for module in model.modules():
        if SLOT in dict(module.named_children()):
            for delta in slot_of(module).values():
                delta.reset_parameters()
    buffers = dict(source.model.named_buffers())
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    model.load_state_dict(source.model.state_dict())
    assert torch.equal(source.logits(model), source.logits())
    randomise(adapter)
    tuned = source.logits(model)
    assert not torch.allclose(tuned, source.logits())
    with pytest.raises(AdapterError, match="meta"):
        adapter.remove()
    assert torch.equal(source.logits(model), tuned)
    adapter.forget()
    assert not any(SLOT in name for name, _ in model.named_modules())


def test_a_shared_module_is_adapted_once(build: Build) -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    x = torch.randn(3, 4)
    base = model(x)
    adapter = inject(model, LoRA(r=2))
    assert len(adapter.deltas) == 1
    randomise(adapter)
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    tuned = model(x)
    adapter.merge()
    torch.testing.assert_close(model(x), tuned)
    assert not torch.allclose(tuned, base)
    assert type(layer) is nn.Linear


def test_a_weight_shared_by_two_modules_is_not_merged(build: Build) -> None:
    example = build("gpt2")
    assert example.model.lm_head.weight is example.model.transformer.wte.weight
    adapter = inject(example.model, LoRA(targets=["c_attn", "lm_head"]))
    randomise(adapter)
    tuned, state = example.logits(), clones(example.model)
    with pytest.raises(NotMergeable, match="`lm_head` shares its weight"):
        adapter.merge()
    assert torch.equal(example.logits(), tuned)
    assert all(torch.equal(t, state[n]) for n, t in example.model.state_dict().items())
    assert example.model.lm_head.weight is example.model.transformer.wte.weight


def test_merge_gives_new_storage_to_the_merged_and_no_other(build: Build) -> None:
    model = build("bert").model
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    values = clones(model)
    adapter = inject(model, LoRA(targets="query"), head=False)
    randomise(adapter)
    adapter.merge()
    moved = {n for n, p in model.named_parameters() if p.data_ptr() != before[n]}
    assert moved == {n for n in before if n.endswith("query.weight")}
    assert all(not torch.equal(model.get_parameter(n), values[n]) for n in moved)


def test_in_place_originals_are_the_bases_own_storage(build: Build) -> None:
    model = build("bert").model
    address = model.classifier.weight.data_ptr()
    adapter = inject(model, LoRA())
    assert model.classifier.weight.data_ptr() != address
    adapter.remove()
    assert model.classifier.weight.data_ptr() == address


def test_what_full_fine_tuning_did_not_keep_cannot_come_back(build: Build) -> None:
    adapter = inject(build("mlp").model, FullFineTuning())
    for action in (adapter.remove, adapter.disabled().__enter__):
        with pytest.raises(AdapterError, match="`keep_original=True` in the method"):
            action()


def test_a_copy_of_a_part_works_on_its_own(build: Build) -> None:
    example = build("bert")
    adapter = inject(example.model, LoRA())
    randomise(adapter)
    part = copy.deepcopy(example.model.bert)
    hidden = part(**example.inputs)[0]
    torch.testing.assert_close(hidden, example.model.bert(**example.inputs)[0])


def test_weights_of_a_tied_pair_are_trained_in_place_as_one(build: Build) -> None:
    example = build("gpt2")
    adapter = inject(example.model, LoRA(targets="c_attn"), train="lm_head")
    assert "transformer.wte.weight" in adapter.named_parameters()
    base = example.logits()
    example.train(adapter.parameters())
    assert example.model.lm_head.weight is example.model.transformer.wte.weight
    with adapter.disabled():
        assert torch.equal(example.logits(), base)


def test_the_state_inside_disabled_is_still_the_tuned_one(build: Build) -> None:
    example = build("bert")
    adapter = inject(example.model, LoRA())
    example.train(adapter.parameters())
    state = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    with adapter.disabled(), pytest.raises(AdapterError, match=r"disabled\(\)"):
        adapter.merge()
    assert all(torch.equal(t, state[n]) for n, t in adapter.state_dict().items())
