"""Several adapters on one base: which act, which are trained, what each has in place."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_peft import Adapter, LoRA, PrefixTuning, inject, load_adapter, mixed, switch
from lightning_peft.carrying.registry import adapters_of
from lightning_peft.delta import NotMergeable
from lightning_peft.errors import AdapterError
from lightning_peft.methods import BitFit, FullFineTuning, LNTuning
from tests.test_every_method import bits, structure

Build = Callable[[str], Any]


def filled(example: Any, names: str, methods: Any, head: bool = True) -> list[Adapter]:
    """Inject an adapter of each name, one after another, each moved away from its start."""
    adapters = []
    for i, name in enumerate(names):
        torch.manual_seed(i)
        adapters.append(inject(example.model, methods, name, head=head))
        with torch.no_grad():
            for parameter in adapters[-1].parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return adapters


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def test_each_has_its_own_head_and_the_base_has_its(build: Build) -> None:
    example = build("bert")
    base = example.logits()
    outputs = {}
    for i, name in enumerate("abc"):
        torch.manual_seed(i)
        adapter = inject(example.model, LoRA(r=2), name)
        example.train(adapter.parameters())
        outputs[name] = example.logits()
    assert [a.active for a in adapters_of(example.model).values()] == [False, False, True]
    for name in "bacab":
        switch(example.model, name)
        assert torch.equal(example.logits(), outputs[name])
        switch(example.model, ())
        assert torch.equal(example.logits(), base)


def test_names_stay_those_of_the_model(build: Build) -> None:
    example = build("bert")
    one = inject(example.model, LoRA(r=2), "one")
    names, state = list(one.named_parameters()), list(one.state_dict())
    inject(example.model, LoRA(r=2), "two")
    inject(example.model, [LoRA(r=2), BitFit()], "three")
    assert list(one.named_parameters()) == names
    assert list(one.state_dict()) == state
    parameters = [p for a in adapters_of(example.model).values() for p in a.parameters()]
    assert len({id(p) for p in parameters}) == len(parameters)


def test_training_one_leaves_the_others_bitwise_unchanged(build: Build) -> None:
    example = build("bert")
    one, two, three = filled(example, "abc", [LoRA(r=2), LNTuning()])
    before = copied(one.state_dict()), copied(three.state_dict())
    switch(example.model, "b")
    two.requires_grad_()
    example.model.train()
    moved = copied(two.state_dict())
    example.train(two.parameters())
    assert same(one.state_dict(), before[0])
    assert same(three.state_dict(), before[1])
    assert not same(two.state_dict(), moved)


def test_active_and_trainable_are_independent(build: Build) -> None:
    example = build("bert")
    one, two = filled(example, "ab", LoRA(r=2))
    assert not one.trainable
    assert not any(p.requires_grad for p in one.parameters())
    one.requires_grad_()
    two.requires_grad_(False)
    assert (one.active, one.trainable, two.active, two.trainable) == (False, True, True, False)
    assert not example.output().requires_grad
    switch(example.model, "a")
    example.output().sum().backward()
    assert all(p.grad is not None for p in one.parameters())
    assert all(p.grad is None for p in two.parameters())


@pytest.mark.parametrize("name", ["cnn", "resnet"])
def test_statistics_of_norms_belong_to_who_trains_them(name: str, build: Build) -> None:
    example = build(name)
    one, two = filled(example, "ab", FullFineTuning(keep_original=True))
    example.model.train()
    for adapter in (one, two, one):
        switch(example.model, adapter.name)
        other = two if adapter is one else one
        before = copied(other.state_dict())
        example.train(adapter.requires_grad_().parameters(), steps=1)
        assert same(other.state_dict(), before)
    assert any("running_mean" in key for key in one.state_dict())
    example.model.eval()
    outputs = {}
    for adapter in (one, two):
        switch(example.model, adapter.name)
        outputs[adapter.name] = example.logits()
    switch(example.model, "a")
    assert torch.equal(example.logits(), outputs["a"])
    assert not torch.equal(outputs["a"], outputs["b"])


def test_a_tied_weight_is_trained_as_one(build: Build) -> None:
    example = build("gpt2")
    base = example.logits()
    one = inject(example.model, LoRA(r=2), "a", train="transformer.wte")
    example.train(one.parameters())
    tuned = example.logits()
    two = inject(example.model, LoRA(r=2), "b", train="transformer.wte")
    example.train(two.parameters())
    assert "lm_head.weight" not in one.state_dict()
    switch(example.model, "a")
    assert torch.equal(example.logits(), tuned)
    switch(example.model, ())
    assert torch.equal(example.logits(), base)


@pytest.mark.parametrize("order", ["abc", "bca", "cab", "cba"])
@pytest.mark.parametrize("name", ["bert", "cnn", "gpt2"])
def test_removal_in_any_order_gives_the_base_back(name: str, order: str, build: Build) -> None:
    example = build(name)
    pristine = copy.deepcopy(example.model)
    methods = LoRA(r=2) if name != "gpt2" else [LoRA(r=2), PrefixTuning(tokens=2)]
    adapters = {a.name: a for a in filled(example, "abc", methods)}
    for one in order:
        adapters[one].remove()
    assert structure(example.model) == structure(pristine)
    assert same(dict(example.model.state_dict()), dict(pristine.state_dict()))


def test_disabled_says_the_base_whatever_acts(build: Build) -> None:
    example = build("bert")
    base = example.logits()
    one, two = filled(example, "ab", [LoRA(r=2), BitFit()])
    tuned = example.logits()
    with two.disabled():
        assert torch.equal(bits(example.logits()), bits(base))
        with one.disabled():
            assert torch.equal(bits(example.logits()), bits(base))
    assert torch.equal(example.logits(), tuned)
    switch(example.model, "a")
    with one.disabled():
        assert torch.equal(bits(example.logits()), bits(base))


def test_a_copy_made_within_disabled_is_switched_on_by_itself(build: Build) -> None:
    example = build("bert")
    base = example.logits()
    _, two = filled(example, "ab", LoRA(r=2))
    tuned = example.logits()
    with two.disabled():
        twin = copy.deepcopy(example.model)
        adapters_of(twin)["b"].activate()
        assert torch.equal(example.logits(twin), tuned)
        assert torch.equal(example.logits(), base)
    switch(twin, "a")
    switch(example.model, "a")
    assert torch.equal(example.logits(twin), example.logits())


def test_a_pickle_carries_all_of_them(build: Build) -> None:
    example = build("bert")
    filled(example, "abc", [LoRA(r=2), BitFit()])
    twin = pickle.loads(pickle.dumps(example.model))
    for name in ("a", "c", "b", ()):
        switch(twin, name)
        switch(example.model, name)
        assert torch.equal(example.logits(twin), example.logits())


def test_one_that_does_not_act_is_saved_and_merged(build: Build, tmp_path: Path) -> None:
    example = build("bert")
    one, _ = filled(example, "ab", [LoRA(r=2), LNTuning()])
    folder = one.save(tmp_path / "a")
    switch(example.model, "a")
    tuned = example.logits()
    fresh = build("bert")
    load_adapter(fresh.model, folder)
    assert torch.equal(fresh.logits(), tuned)
    switch(example.model, "b")
    twin = copy.deepcopy(example.model)
    adapters_of(twin)["b"].remove()
    adapters_of(twin)["a"].merge()
    torch.testing.assert_close(example.logits(twin), tuned, rtol=1e-4, atol=1e-5)


def test_a_full_state_holds_those_that_do_not_act_too(build: Build) -> None:
    example, other = build("bert"), build("bert")
    filled(example, "ab", LoRA(r=2))
    for name in "ab":
        inject(other.model, LoRA(r=2), name)
    other.model.load_state_dict(copied(dict(example.model.state_dict())), strict=True)
    for name in "ab":
        switch(example.model, name)
        switch(other.model, name)
        assert torch.equal(other.logits(), example.logits())


def test_settled_again_it_is_in_the_models_own_tensors(build: Build) -> None:
    example = build("bert")
    one, _ = filled(example, "ab", LoRA(r=2))
    switch(example.model, "a")
    tuned = example.logits()
    own = copied(one.state_dict())
    one.settle()
    assert torch.equal(example.logits(), tuned)
    assert same(one.state_dict(), own)
    assert one.named_parameters()["classifier.weight"] is example.model.classifier.weight
    example.train(one.parameters(), steps=1)
    assert not same(one.state_dict(), own)


def test_who_trains_the_same_weight_cannot_act_together(build: Build) -> None:
    example = build("bert")
    filled(example, "ab", LoRA(r=2))
    before = example.logits()
    with pytest.raises(AdapterError, match=r"trained in place by `\w` and by `\w`"):
        switch(example.model, ("a", "b"))
    with pytest.raises(AdapterError, match="carries no adapter `c`"):
        switch(example.model, "c")
    assert torch.equal(example.logits(), before)


def test_a_switch_compiles_nothing_anew(build: Build) -> None:
    example = build("llama")
    for adapter in filled(example, "abc", LoRA(r=2)):
        adapter.requires_grad_(False)  # a graph is one of what is trained, or of what is not
    torch.compiler.reset()
    graphs = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(example.model, backend=count, fullgraph=True)
    for name in "abcab":
        switch(example.model, name)
        torch.testing.assert_close(example.logits(compiled), example.logits())
    assert graphs == 1


def test_four_on_one_base_take_the_memory_of_one_base(build: Build) -> None:
    example = build("bert")
    size = held(example.model)
    adapters = filled(example, "abcd", LoRA(r=2))
    assert held(example.model) == size + sum(adapter.num_bytes for adapter in adapters)


def held(model: Any) -> int:
    """Return the bytes of the distinct storages of a model's tensors and of what is put aside."""
    tensors = [*model.parameters(), *model.buffers()]
    for adapter in adapters_of(model).values():
        aside = adapter.replaced("a sum")
        tensors += [tensor for own in aside.values() for tensor in own.values()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def test_nothing_is_injected_while_another_is_switched_off(build: Build, tmp_path: Path) -> None:
    example = build("bert")
    adapter = filled(example, "a", LoRA(r=2))[0]
    folder, before = adapter.save(tmp_path / "a"), example.logits()
    with adapter.disabled():
        with pytest.raises(AdapterError, match=r"`inject\(\)` within `disabled\(\)`"):
            inject(example.model, LoRA(r=2), "b")
        with pytest.raises(AdapterError, match=r"within `disabled\(\)`"):
            load_adapter(example.model, folder, "c")
    assert list(adapters_of(example.model)) == ["a"]
    assert torch.equal(example.logits(), before)


def test_one_that_does_not_act_is_not_merged_over_another(build: Build) -> None:
    example = build("bert")
    filled(example, "ab", LoRA(r=2))
    before = example.logits()
    with pytest.raises(NotMergeable, match="`a` does not act"):
        adapters_of(example.model)["a"].merge()
    assert torch.equal(example.logits(), before)


@pytest.mark.parametrize(
    "change",
    [
        lambda model, adapter: switch(model, "b"),
        lambda model, adapter: adapter.deactivate(),
        lambda model, adapter: adapter.activate(),
        lambda model, adapter: adapter.remove(),
        lambda model, adapter: adapter.merge(),
        lambda model, adapter: adapter.disabled().__enter__(),
        lambda model, adapter: inject(model, LoRA(), "c"),
    ],
    ids=["switch", "deactivate", "activate", "remove", "merge", "disabled", "inject"],
)
def test_a_mixture_is_not_ended_unnoticed(change: Any, build: Build) -> None:
    example = build("bert")
    adapters = filled(example, "ab", LoRA(r=2))  # the second one acts
    rows = ["a", "b", None]
    with torch.no_grad(), mixed(example.model, rows):
        before = example.logits()
        with pytest.raises(AdapterError, match=r"within `mixed\(\)`"):
            change(example.model, adapters[1])
        assert torch.equal(example.logits(), before)


def test_a_switch_that_cannot_be_finished_changes_nothing(build: Build) -> None:
    example = build("bert")
    adapters = filled(example, "ab", LoRA(r=2))
    switch(example.model, "a")
    with adapters[0].disabled():
        off = example.logits()
        with pytest.raises(AdapterError, match=r"`switch\(\)` within `disabled\(\)`"):
            switch(example.model, "b")
        assert torch.equal(example.logits(), off)
    assert [adapter.active for adapter in adapters] == [True, False]


def test_what_was_chosen_since_is_not_undone_by_a_removal(build: Build) -> None:
    example = build("bert")
    adapters = {}
    for name in "abc":
        adapters[name] = inject(example.model, LoRA(r=2, targets="query"), name, head=False)
    switch(example.model, ["a", "c"])
    adapters["c"].remove()
    assert [adapters[name].active for name in "ab"] == [True, False]


def test_a_switch_sees_adapters_of_inner_modules(build: Build) -> None:
    example = build("bert")
    base = example.logits()
    inner = inject(example.model.bert, LoRA(r=2), "inner", head=False)
    outer = inject(example.model, LoRA(r=2), "outer", head=False)
    switch(example.model, "inner")
    assert (inner.active, outer.active) == (True, False)
    later = inject(example.model.bert, LoRA(r=3), "later", head=False)
    switch(example.model, "outer")
    assert (inner.active, outer.active, later.active) == (False, True, False)
    switch(example.model, ())
    assert torch.equal(example.logits(), base)
