"""What every method promises on every kind of model.

The methods are the YAML files of `conf/method/`, found by glob: a new method is tested here as soon
as its file is there. Each test runs for each method, on one kind of model that rotates from test to
test and from method to method; the other kinds are marked slow (`make test-full`).
"""

import contextlib
import copy
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from lightning_peft import Adapter, inject, load_adapter
from lightning_peft.carrying.registry import adapters_of
from lightning_peft.config import instantiate, to_spec
from lightning_peft.delta import SLOT, NotMergeable
from lightning_peft.errors import AdapterError, PEFTError, TargetError
from lightning_peft.method import Method
from tests.catalogue import METHODS

KINDS = {"encoder": "bert", "decoder": "llama", "encoder-decoder": "t5", "vision": "vit"}
KINDS_THAT_GENERATE = ("decoder", "encoder-decoder")
REASONS = ("has no table of token embeddings", "has no biases to train")
SLOW_TO_COMPILE = ("encoder-decoder", "vision")

Build = Callable[[str], Any]


def test_methods_are_found() -> None:
    assert {"lora", "freeze", "full"} <= {path.stem for path in METHODS}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kind" in metafunc.fixturenames:
        metafunc.parametrize(
            "methods,kind", cells(metafunc.function.__name__), indirect=["methods"]
        )
    elif "methods" in metafunc.fixturenames:
        metafunc.parametrize("methods", METHODS, indirect=True, ids=lambda path: path.stem)


def cells(test: str) -> list[Any]:
    """Return each method on each kind of model, all kinds but one of them marked slow."""
    kinds = [k for k in KINDS if "compiled" not in test or k not in SLOW_TO_COMPILE]
    turn = sum(test.encode())
    return [
        pytest.param(
            path,
            kind,
            id=f"{path.stem}-{kind}",
            marks=() if kind == kinds[(turn + i) % len(kinds)] else pytest.mark.slow,
        )
        for i, path in enumerate(METHODS)
        for kind in KINDS
    ]


@pytest.fixture
def methods(request: pytest.FixtureRequest) -> list[Method]:
    config = yaml.safe_load(request.param.read_text(encoding="utf-8"))["method"]
    return [instantiate(spec) for spec in config.values()]


@pytest.fixture
def example(kind: str, build: Build, methods: list[Method]) -> Any:
    built = build(KINDS[kind])
    if refusal := inapplicable(built, methods):
        pytest.skip(refusal)
    return built


def inapplicable(example: Any, methods: list[Method]) -> str:
    """Return why a method refuses a model of this kind, where the reason is one that holds."""
    try:
        for method in methods:
            method.in_place(example.model)
            method.deltas(example.model)
    except TargetError as error:
        if not any(reason in str(error) for reason in REASONS):
            raise
        return str(error)
    return ""


@pytest.fixture
def pristine(example: Any) -> nn.Module:
    return copy.deepcopy(example.model)


def tuned(example: Any, methods: list[Method]) -> Adapter:
    """Inject and take two steps, so that the adapter really changes the outputs."""
    adapter = inject(example.model, methods)
    example.model.train()
    example.train(adapter.parameters())
    example.model.eval()
    return adapter


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(bits(one[k]), bits(other[k])) for k in one
    )


def structure(model: nn.Module) -> dict[str, Any]:
    """Everything about the modules that an adapter could leave behind."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        hooks = {k: list(v) for k, v in module.__dict__.items() if "hooks" in k}
        flags = {n: p.requires_grad for n, p in module.named_parameters(recurse=False)}
        found[name] = (type(module), sorted(module.__dict__), module.training, hooks, flags)
    return found


def without_adapter(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if SLOT not in key.split(".")}


@contextlib.contextmanager
def restorable(adapter: Adapter) -> Iterator[None]:
    """Expect success where the method keeps originals, else the refusal that says so."""
    if all(method.keeps_original for method in adapter.methods):
        yield
    else:
        with pytest.raises(AdapterError, match="keep_original=True"):
            yield


def test_settings_survive_a_round_trip(methods: list[Method]) -> None:
    assert [instantiate(to_spec(method)) for method in methods] == methods


def test_starts_as_the_base(example: Any, methods: list[Method]) -> None:
    before = example.logits()
    inject(example.model, methods)
    same = all(method.starts_as_base for method in methods)
    assert torch.equal(example.logits(), before) == same


def test_injection_changes_no_key_and_no_type(
    example: Any, pristine: nn.Module, methods: list[Method]
) -> None:
    inject(example.model, methods)
    state = example.model.state_dict()
    assert list(without_adapter(state)) == list(pristine.state_dict())
    assert same_bits(without_adapter(state), dict(pristine.state_dict()))
    present = dict(example.model.named_modules())
    for name, module in pristine.named_modules():
        assert isinstance(present[name], type(module))
        assert type(present[name]).__name__ == type(module).__name__
        assert repr(type(present[name])) == repr(type(module))


def test_exactly_what_is_declared_is_trainable(example: Any, methods: list[Method]) -> None:
    adapter = inject(example.model, methods)
    trainable = {n for n, p in example.model.named_parameters() if p.requires_grad}
    assert trainable == set(adapter.named_parameters())
    assert list(adapter.named_parameters()) == sorted(trainable)
    assert adapter.num_parameters == sum(p.numel() for p in adapter.parameters()) > 0


def test_base_stays_bitwise_the_same(
    example: Any, pristine: nn.Module, methods: list[Method]
) -> None:
    before = pristine.state_dict()
    adapter = tuned(example, methods)
    trained = set(adapter.state_dict())
    frozen = without_adapter(example.model.state_dict())
    untouched = [k for k in frozen if k not in trained]
    tied = {frozen[k].data_ptr() for k in frozen if k in trained}
    for key in untouched:
        if frozen[key].data_ptr() not in tied:
            assert torch.equal(bits(frozen[key]), bits(before[key])), key
    base = example.logits(pristine)
    assert not torch.equal(example.logits(), base)
    with restorable(adapter), adapter.disabled():
        assert same_bits(without_adapter(example.model.state_dict()), dict(before))
        assert torch.equal(bits(example.logits()), bits(base))
    assert not torch.equal(example.logits(), base)


def test_disabled_restores_the_tuned_state_even_after_an_error(
    example: Any, methods: list[Method]
) -> None:
    adapter = tuned(example, methods)
    state = {k: t.clone() for k, t in example.model.state_dict().items()}
    output = example.logits()
    with restorable(adapter):
        with pytest.raises(ZeroDivisionError), adapter.disabled(), adapter.disabled():
            raise ZeroDivisionError
        assert same_bits(dict(example.model.state_dict()), state)
        assert torch.equal(example.logits(), output)
        raise_refusal_again(adapter)


def raise_refusal_again(adapter: Adapter) -> None:
    """Where nothing was refused there is nothing to raise; else `disabled()` already has."""
    assert all(method.keeps_original for method in adapter.methods)


def test_removal_is_exact(example: Any, methods: list[Method]) -> None:
    for i, parameter in enumerate(example.model.parameters()):
        parameter.requires_grad_(i % 3 != 0)
    example.model.train()
    next(iter(example.model.children())).eval()
    pristine = copy.deepcopy(example.model)
    addresses = {k: t.data_ptr() for k, t in example.model.state_dict().items()}
    adapter = inject(example.model, methods)
    example.train(adapter.parameters())
    with restorable(adapter):
        assert adapter.remove() is example.model
        assert structure(example.model) == structure(pristine)
        assert same_bits(dict(example.model.state_dict()), dict(pristine.state_dict()))
        assert {k: t.data_ptr() for k, t in example.model.state_dict().items()} == addresses
        with pytest.raises(AdapterError, match="no longer"):
            adapter.remove()


def test_every_parameter_gets_a_gradient(example: Any, methods: list[Method]) -> None:
    adapter = inject(example.model, methods)
    example.model.train()
    example.model.eval()
    example.logits()
    example.model.train()
    moved: set[str] = set()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    for _ in range(2):
        example.step(optimizer)
        grads = {n: p.grad for n, p in adapter.named_parameters().items()}
        moved |= {n for n, grad in grads.items() if grad is not None and grad.abs().sum() > 0}
    assert moved == set(adapter.named_parameters())
    frozen = [p for p in example.model.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in frozen)


def test_a_base_checkpoint_loads_before_and_after(
    example: Any, pristine: nn.Module, methods: list[Method]
) -> None:
    example.model.load_state_dict(pristine.state_dict(), strict=True)
    adapter = tuned(example, methods)
    deltas = {n: p.detach().clone() for n, p in adapter.named_parameters().items() if SLOT in n}
    example.model.load_state_dict(pristine.state_dict(), strict=True)
    assert same_bits(without_adapter(example.model.state_dict()), dict(pristine.state_dict()))
    assert same_bits({n: adapter.named_parameters()[n].detach() for n in deltas}, deltas)


def test_a_full_state_dict_round_trips_strictly(
    example: Any, methods: list[Method], build: Build
) -> None:
    tuned(example, methods)
    other = build(example.name)
    inject(other.model, methods)
    state = {key: tensor.clone() for key, tensor in example.model.state_dict().items()}
    other.model.load_state_dict(state, strict=True)
    assert torch.equal(other.logits(), example.logits())
    if lost := [key for key in state if SLOT in key.split(".")]:
        del state[lost[0]]
        if len(lost) > 1:
            with pytest.raises(RuntimeError, match="Missing key"):
                other.model.load_state_dict(state, strict=True)


def test_saved_and_loaded_gives_the_same_logits(
    example: Any, methods: list[Method], build: Build, tmp_path: Path
) -> None:
    adapter = tuned(example, methods)
    other = build(example.name)
    loaded = load_adapter(other.model, adapter.save(tmp_path / "adapter"))
    assert torch.equal(other.logits(), example.logits())
    assert same_bits(loaded.state_dict(), adapter.state_dict())
    assert loaded.methods == adapter.methods
    assert set(loaded.named_parameters()) == set(adapter.named_parameters())


def test_a_copy_is_independent(example: Any, pristine: nn.Module, methods: list[Method]) -> None:
    adapter = tuned(example, methods)
    output = example.logits()
    twin = copy.deepcopy(example.model)
    assert torch.equal(example.logits(twin), output)
    theirs = adapters_of(twin)["default"]
    assert theirs.model is twin
    assert not {id(p) for p in theirs.parameters()} & {id(p) for p in adapter.parameters()}
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.zero_()
    assert torch.equal(example.logits(), output)
    with restorable(theirs):
        theirs.remove()
        assert structure(twin) == structure(pristine)
        assert same_bits(dict(twin.state_dict()), dict(pristine.state_dict()))
    assert torch.equal(example.logits(), output)


def test_merged_model_is_plain_and_gives_the_same_logits(
    example: Any, pristine: nn.Module, methods: list[Method]
) -> None:
    adapter = tuned(example, methods)
    output = example.logits()
    state = {key: tensor.clone() for key, tensor in example.model.state_dict().items()}
    try:
        merged = adapter.merge()
    except NotMergeable:
        assert same_bits(dict(example.model.state_dict()), state)
        return
    torch.testing.assert_close(example.logits(merged), output, rtol=1e-4, atol=1e-5)
    assert structure(merged) == structure(pristine)
    assert list(merged.state_dict()) == list(pristine.state_dict())
    with pytest.raises(AdapterError, match="no longer"):
        adapter.merge()
    torch.testing.assert_close(example.logits(merged), output, rtol=1e-4, atol=1e-5)


def test_save_pretrained_gives_a_plain_folder(
    example: Any, methods: list[Method], tmp_path: Path
) -> None:
    adapter = tuned(example, methods)
    example.model.save_pretrained(tmp_path)
    trained = set(adapter.named_parameters())
    loaded, info = type(example.model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, example.model.state_dict()[key]), key
    assert not any(SLOT in name for name in loaded.state_dict())
    assert any(name in trained for name in loaded.state_dict()) == bool(adapter.in_place)


def test_gradient_checkpointing_gives_the_same_gradients(
    example: Any, methods: list[Method]
) -> None:
    adapter = tuned(example, methods)
    example.model.train()
    example.train(adapter.parameters(), steps=0)
    plain = gradients(example, adapter)
    example.model.activation_checkpointing_enable()
    torch.testing.assert_close(gradients(example, adapter), plain, rtol=1e-5, atol=1e-7)


def gradients(example: Any, adapter: Adapter) -> dict[str, Tensor]:
    example.model.zero_grad()
    example.output().square().mean().backward()
    return {n: p.grad.clone() for n, p in adapter.named_parameters().items() if p.grad is not None}


def test_generate_runs_the_tuned_model(methods: list[Method], build: Build) -> None:
    for kind in KINDS_THAT_GENERATE:
        example = build(KINDS[kind])
        if inapplicable(example, methods):
            continue
        ids, mask = (example.inputs[name] for name in ("input_ids", "attention_mask"))
        settings = {"max_new_tokens": 5, "do_sample": False, "attention_mask": mask}
        bare = example.model.generate(ids, **settings)
        adapter = tuned(example, methods)
        cached = bare
        for _ in range(6):  # a method with few parameters takes longer to change a token
            if torch.equal(cached, bare):
                example.train(adapter.parameters(), steps=20)
                cached = example.model.generate(ids, **settings)
        assert torch.equal(cached, example.model.generate(ids, use_cache=False, **settings))
        assert not torch.equal(cached, bare)
        with restorable(adapter), adapter.disabled():
            assert torch.equal(example.model.generate(ids, **settings), bare)


@pytest.mark.parametrize("name", ["tagger", "translator"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_the_fast_path_of_torchs_encoder_does_not_pass_the_adapter_by(
    name: str, methods: list[Method], build: Build
) -> None:
    example = build(name)
    base = example.logits()
    adapter = tuned(example, methods)
    fast = example.logits()
    example.model.train()
    torch.testing.assert_close(fast, example.logits(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(fast, base, atol=1e-3)
    example.model.eval()
    with restorable(adapter), adapter.disabled():
        torch.testing.assert_close(example.logits(), base, rtol=1e-4, atol=1e-5)


def test_compiled_gives_the_same_beside_a_compiled_sibling(
    example: Any, pristine: nn.Module, methods: list[Method]
) -> None:
    torch.compiler.reset()
    sibling = torch.compile(pristine, backend="aot_eager", fullgraph=True)
    base = example.logits(sibling)
    adapter = inject(example.model, methods)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.05)
    compiled = torch.compile(example.model, backend="aot_eager", fullgraph=True)
    tuned_output = example.logits(compiled)
    torch.testing.assert_close(tuned_output, example.logits(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(tuned_output, base, atol=1e-4)
    with restorable(adapter), adapter.disabled():
        torch.testing.assert_close(example.logits(compiled), base, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(example.logits(compiled), tuned_output, rtol=0, atol=0)


def test_pickles_into_a_fresh_process(build: Build, tmp_path: Path) -> None:
    expected = {}
    for path in METHODS:
        for name in KINDS.values():
            config = yaml.safe_load(path.read_text(encoding="utf-8"))["method"]
            example = build(name)
            methods = [instantiate(spec) for spec in config.values()]
            if inapplicable(example, methods):
                continue
            tuned(example, methods)
            file = tmp_path / f"{path.stem}-{name}.pt"
            torch.save((example.model, example.inputs), file)
            expected[file.name] = example.logits()
            assert pickle.loads(pickle.dumps(example.model)).state_dict().keys()
    script = """
import sys, torch, pathlib
from lightning_peft.carrying.registry import adapters_of
torch.set_num_threads(1)
outputs = {}
for file in sorted(pathlib.Path(sys.argv[1]).glob("*.pt")):
    model, inputs = torch.load(file, weights_only=False)
    with torch.no_grad():
        outputs[file.name] = model(**inputs)[0]
    adapter = adapters_of(model)["default"]
    assert adapter.model is model and adapter.parameters()
    model.load_state_dict(model.state_dict(), strict=True)
    adapter.forget()
    assert not any("lightning_peft" in key for key in model.state_dict())
torch.save(outputs, sys.argv[2])
"""
    out = tmp_path / "outputs"
    subprocess.run([sys.executable, "-c", script, str(tmp_path), str(out)], check=True)
    torch.testing.assert_close(torch.load(out, weights_only=True), expected, rtol=0, atol=0)


def test_injecting_twice_is_refused_and_changes_nothing(
    example: Any, methods: list[Method]
) -> None:
    inject(example.model, methods)
    before, state = structure(example.model), dict(example.model.state_dict())
    with pytest.raises(PEFTError, match="already carries"):
        inject(example.model, methods)
    assert structure(example.model) == before
    assert same_bits(dict(example.model.state_dict()), state)
