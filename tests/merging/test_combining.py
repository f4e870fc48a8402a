"""Combined adapters: what peft combines, the formulas themselves, every kind of method."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from torch import Tensor, nn

from lightning_peft import (
    BottleneckAdapter,
    LoRA,
    PrefixTuning,
    PromptTuning,
    inject,
    load_adapter,
)
from lightning_peft.carrying.registry import adapters_of
from lightning_peft.config import instantiate
from lightning_peft.delta import SLOT
from lightning_peft.errors import AdapterError, PEFTError
from lightning_peft.merging.combining import How, combine
from lightning_peft.merging.joining import Joint, write_factors
from lightning_peft.methods import (
    IA3,
    OFT,
    BitFit,
    DoRA,
    FourierFT,
    LoHa,
    LoRAPlus,
    PiSSA,
)
from tests.catalogue import METHODS

Build = Callable[[str], Any]

AS_IN_PEFT = [how for how in get_args(How) if how != "sum"]


def shake(adapter: Any, seed: int) -> Any:
    """Give an adapter values as different as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(noise, alpha=0.1)
    return adapter


def adapted(model: nn.Module, name: str, method: Any, seed: int, head: bool = False) -> Any:
    return shake(inject(model, method, name, head=head), seed)


def change(model: nn.Module, base: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what merging would add to each weight."""
    merged = copy.deepcopy(model)
    for adapter in adapters_of(merged).values():
        if adapter.active:
            adapter.merge()
    state = {n: t for n, t in merged.state_dict().items() if f".{SLOT}." not in n}
    return {n: t - base[n] for n, t in state.items() if not torch.equal(t, base[n])}


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
# peft keeps roots of weight times scale in float32, and these roots are exact there.
@pytest.mark.parametrize("weights", [(1.5, 0.375), (1.5, -0.375)], ids=["positive", "negative"])
@pytest.mark.parametrize("how", AS_IN_PEFT)
def test_combines_as_peft(
    how: str, weights: tuple[float, float], build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: run `pip install '.[dev]'`")
    example = build("llama")
    example.model.double()
    targets = ["q_proj", "down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets)
    theirs = peft.get_peft_model(copy.deepcopy(example.model), config, "a").double()
    theirs.add_adapter("b", config)
    for i, name in enumerate(["a", "b"]):
        adapter = adapted(example.model, name, LoRA(r=4, alpha=6, targets=targets), i)
        for key, tensor in adapter.state_dict().items():
            host, _, end = key.partition(f".{SLOT}.{name}_lora.")
            factor = theirs.get_parameter(f"base_model.model.{host}.{end}.{name}.weight")
            factor.data.copy_(tensor)
    needs = {"density": 0.4} if how.startswith(("ties", "dare", "magnitude")) else {}
    mix = combine(example.model, dict(zip("ab", weights, strict=True)), how, seed=3, **needs)
    make = theirs.base_model.inject_adapter
    # A new adapter's own start takes from the same random numbers.
    monkeypatch.setattr(
        theirs.base_model, "inject_adapter", lambda *a, **k: (make(*a, **k), torch.manual_seed(3))
    )
    theirs.double().add_weighted_adapter(["a", "b"], list(weights), "mix", how, **needs)
    theirs.set_adapter("mix")
    expected = example.output(theirs.double().eval())
    torch.testing.assert_close(example.output(), expected, rtol=1e-9, atol=1e-9)
    assert mix.active
    with mix.disabled():
        assert not torch.allclose(example.output(), expected, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "cnn", "tagger"])
def test_the_sum_is_the_weighted_sum_of_the_changes(name: str, build: Build) -> None:
    example = build(name)
    example.model.double()
    model, base = example.model, {n: t.clone() for n, t in example.model.state_dict().items()}
    if name == "cnn":
        methods = [LoRA(r=2, targets=["conv_pw", "conv_stem"]), LoRA(r=4, targets="conv_pw")]
    else:
        methods = [LoRA(r=2, alpha=3), LoRA(r=5, rslora=True)]
    changes = []
    for i, method in enumerate(methods):
        adapted(model, f"a{i}", method, i)
        changes.append(change(model, base))
    combine(model, {"a0": 0.5, "a1": -2.0})
    found = change(model, base)
    assert found.keys() == changes[0].keys() | changes[1].keys()
    for key, tensor in found.items():
        first, second = (c.get(key, torch.zeros_like(tensor)) for c in changes)
        torch.testing.assert_close(tensor, 0.5 * first - 2.0 * second, rtol=1e-9, atol=1e-12)


def test_methods_of_one_family_add_up(build: Build) -> None:
    example = build("bert")
    example.model.double()
    model, base = example.model, {n: t.clone() for n, t in example.model.state_dict().items()}
    methods = {"lora": LoRA(r=2), "pissa": PiSSA(r=3), "plus": LoRAPlus(targets=["query"])}
    changes = []
    for i, (name, method) in enumerate(methods.items()):
        adapted(model, name, method, i)
        changes.append(change(model, base))
    mix = combine(model, dict.fromkeys(methods, 0.3))
    for key, tensor in change(model, base).items():
        expected = sum(0.3 * c[key] for c in changes if key in c)
        torch.testing.assert_close(tensor, expected, rtol=1e-8, atol=1e-11)
    assert {m.kind for m in mix.methods} == {"lora"}


@pytest.mark.parametrize("rank", [1, 3, 40])
def test_svd_is_the_nearest_of_a_rank_for_any_change_of_weights(rank: int, build: Build) -> None:
    example = build("bert")
    example.model.double()
    model, base = example.model, {n: t.clone() for n, t in example.model.state_dict().items()}
    changes = []
    for i, method in enumerate([DoRA(r=2), LoHa(r=2), OFT(), FourierFT(), LoRA(r=2)]):
        adapted(model, f"a{i}", method, i)
        changes.append(change(model, base))
    combine(model, {f"a{i}": 0.5 for i in range(5)}, "svd", rank=rank)
    for key, tensor in change(model, base).items():
        whole = sum(0.5 * c[key] for c in changes if key in c)
        left = torch.linalg.svdvals(whole)[rank:].square().sum().sqrt()
        assert abs((tensor - whole).norm() - left) < 1e-9
        assert torch.linalg.matrix_rank(tensor, atol=1e-9) <= rank


def test_one_adapter_as_it_is(build: Build) -> None:
    for method in (LoRA(), IA3(), BottleneckAdapter(), PromptTuning()):
        example = build("llama")
        adapted(example.model, "a", method, 0)
        tuned = example.logits()
        combine(example.model, {"a": 1.0})
        torch.testing.assert_close(example.logits(), tuned, rtol=1e-5, atol=1e-5)


def test_vectors_are_counted_from_where_they_start(build: Build) -> None:
    example = build("bert")
    a, b = (adapted(example.model, name, IA3(), i) for i, name in enumerate("ab"))
    mix = combine(example.model, {"a": 0.5, "b": -1.0})
    states = [a.state_dict().values(), b.state_dict().values(), mix.state_dict().values()]
    for one, other, both in zip(*states, strict=True):
        expected = 1 + 0.5 * (one - 1) - 1.0 * (other - 1)
        torch.testing.assert_close(both, expected)


@pytest.mark.parametrize("method", [PrefixTuning(tokens=3), BottleneckAdapter(), PromptTuning()])
def test_what_starts_at_random_has_a_mean(method: Any, build: Build) -> None:
    example = build("llama")
    a, b = (adapted(example.model, name, method, i) for i, name in enumerate("ab"))
    mix = combine(example.model, {"a": 0.25, "b": 0.75}, "linear")
    states = [a.state_dict().values(), b.state_dict().values(), mix.state_dict().values()]
    for one, other, both in zip(*states, strict=True):
        torch.testing.assert_close(both, 0.25 * one + 0.75 * other)
    with pytest.raises(AdapterError, match="add up to 1"):
        combine(example.model, {"a": 1.0, "b": 1.0}, name="more")
    with pytest.raises(AdapterError, match="changes of weights"):
        combine(example.model, {"a": 0.5, "b": 0.5}, "svd", name="more", rank=2)


def test_a_head_is_combined_as_a_change_of_the_base(build: Build) -> None:
    example = build("bert")
    model = example.model
    start = model.classifier.weight.detach().clone()
    a, b = (adapted(model, name, LoRA(), i, head=True) for i, name in enumerate("ab"))
    heads = [adapter.state_dict()["classifier.weight"].clone() for adapter in (a, b)]
    tuned = example.logits()
    mix = combine(model, {"a": 2.0, "b": -0.5})
    expected = start + 2.0 * (heads[0] - start) - 0.5 * (heads[1] - start)
    torch.testing.assert_close(model.classifier.weight.detach(), expected)
    assert "classifier.weight" in mix.in_place
    chosen = combine(model, {"a": 0.5, "b": 0.5}, name="chosen", in_place="b")
    assert torch.equal(chosen.state_dict()["classifier.weight"], heads[1])
    for adapter, head in zip((a, b), heads, strict=True):
        assert torch.equal(adapter.state_dict()["classifier.weight"], head)
    chosen.remove()
    mix.remove()
    b.activate()
    assert torch.equal(example.logits(), tuned)


def test_weights_in_place_between_the_base_and_what_was_trained(build: Build) -> None:
    example = build("bert")
    base = example.model.bert.pooler.dense.bias.detach().clone()
    adapter = adapted(example.model, "a", BitFit(), 0)
    tuned = adapter.state_dict()["bert.pooler.dense.bias"].clone()
    mix = combine(example.model, {"a": 0.25})
    found = mix.state_dict()["bert.pooler.dense.bias"]
    torch.testing.assert_close(found, base + 0.25 * (tuned - base))


def test_the_seed_decides_what_is_dropped(build: Build) -> None:
    example = build("bert")
    for i, name in enumerate("ab"):
        adapted(example.model, name, LoRA(), i)
    states = []
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        mix = combine(
            example.model, {"a": 0.5, "b": 0.5}, "dare_ties_svd", name, density=0.5, seed=seed
        )
        states.append(list(mix.state_dict().values()))
    assert all(map(torch.equal, states[0], states[1]))
    assert not all(map(torch.equal, states[0], states[2]))


def test_a_combination_is_an_adapter_like_any_other(build: Build, tmp_path: Path) -> None:
    example = build("bert")
    adapted(example.model, "a", LoRA(r=2, rank_pattern={"query": 5}), 0, head=True)
    adapted(example.model, "b", LoRA(r=3, targets=["key", "query"]), 1, head=True)
    mix = combine(example.model, {"a": 0.5, "b": 0.5})
    tuned = example.logits()
    mix.save(tmp_path)
    fresh = build("bert")
    loaded = load_adapter(fresh.model, tmp_path)
    assert torch.equal(fresh.logits(), tuned)
    fresh.model.train()
    fresh.train(loaded.parameters())
    assert not torch.equal(fresh.logits(), tuned)


def test_refusals_change_nothing(build: Build) -> None:
    example = build("bert")
    model = example.model
    methods = {"a": LoRA(), "b": LoRA(r=3), "c": DoRA(), "d": PiSSA()}
    for i, (name, method) in enumerate(methods.items()):
        adapted(model, name, method, i)
    before, tuned = set(adapters_of(model)), example.logits()
    pair = {"a": 0.5, "b": 0.5}
    for weights, how, settings, message in (
        ({"a": 1, "bb": 1}, "sum", {}, "names 'bb'"),
        ({}, "sum", {}, "finite number"),
        ({"a": float("nan")}, "sum", {}, "finite number"),
        (pair, "tie", {}, "Did you mean"),
        (pair, "ties", {}, r"`density` must lie in \(0, 1\]"),
        (pair, "ties", {"density": 0}, "`density` must lie"),
        (pair, "sum", {"density": 0.5}, "`density` must be None"),
        (pair, "sum", {"rank": 4}, "`rank` must be None"),
        (pair, "svd", {"rank": 0}, "`rank` must be at least 1"),
        (pair, "linear", {}, "factors of one rank"),
        ({"a": 0.5, "c": 0.5}, "sum", {}, "different methods or targets"),
        ({"c": 0.5}, "sum", {}, "factors of dora.* use 'svd'"),
        ({"d": 0.5}, "linear", {}, "factors of pissa.* use 'sum' or 'svd'"),
        (pair, "sum", {"name": "a"}, "already carries"),
        (pair, "sum", {"in_place": "e"}, "`in_place` must be one of"),
    ):
        with pytest.raises(AdapterError, match=message):
            combine(model, weights, how, **settings)
    assert set(adapters_of(model)) == before
    assert torch.equal(example.logits(), tuned)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "llama", "t5", "vit"])
@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_every_method_is_combined_or_refused(path: Path, kind: str, build: Build) -> None:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))["method"]
    methods = [instantiate(spec) for spec in config.values()]
    example = build(kind)
    try:
        for i, name in enumerate("ab"):
            adapted(example.model, name, methods, i)
    except PEFTError as error:
        pytest.skip(str(error))
    tuned = example.logits()
    for how in get_args(How):
        needs = {"density": 0.5} if how.startswith(("ties", "dare", "magnitude")) else {}
        needs |= {"rank": 3} if how.endswith("svd") else {}
        try:
            mix = combine(example.model, {"a": 0.5, "b": 0.5}, how, **needs)
        except AdapterError:
            # Of factors that start at random only the product has a meaning, and `svd` takes it.
            assert how != "sum" or path.stem in ("dora", "hira", "loha", "lokr")
            assert how != "svd" or path.stem not in ("lora", "dora", "hira", "loha", "lokr", "oft")
        else:
            assert example.logits().isfinite().all()
            mix.remove()
        assert set(adapters_of(example.model)) == {"a", "b"}
        assert torch.equal(example.logits(), tuned)


class Ends(nn.Module):
    """A linear layer whose name is the end of another one's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.block = nn.Linear(8, 8), nn.ModuleDict({"fc": nn.Linear(8, 8)})

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block["fc"](x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["sum", "svd"])
@pytest.mark.parametrize(
    ("targets", "ranks"), [("re:fc", {}), ("fc", {"re:fc": 2}), ("fc", {"re:fc": 6})]
)
def test_a_name_that_is_the_end_of_another(targets: str, ranks: Any, how: How) -> None:
    model, x = Ends(), torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    one = adapted(model, "one", LoRA(r=4, targets=targets, rank_pattern=ranks), 0)
    expected = model(x)
    mix = combine(model, {"one": 1.0}, how)
    torch.testing.assert_close(model(x), expected)
    hosts = {host: delta.lora_A.shape for host, _, delta in one.deltas}
    assert {host: delta.lora_A.shape for host, _, delta in mix.deltas} == hosts


def test_factors_that_do_not_fit_are_refused() -> None:
    mix = inject(Ends(), LoRA(r=1, targets="re:fc"), "mix", head=False)
    site, a, b = "weight", torch.ones(2, 8), torch.ones(8, 2)
    with pytest.raises(AdapterError, match=r"shape \(2, 8\) does not fit into one of \(1, 8\)"):
        write_factors(mix, {"fc": {site: Joint(a, b, 2)}})
    with pytest.raises(AdapterError, match=r"`weight` of `block\.fc` is in the adapters alone"):
        write_factors(mix, {host: {site: Joint(a, b, 2)} for host in ("fc", "block.fc")})
