"""Merging with a certificate: every method, every dtype, and every way back."""

import contextlib
import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    switch,
)
from lightning_peft.adapter import Adapter
from lightning_peft.carrying.registry import adapters_of
from lightning_peft.config import instantiate
from lightning_peft.delta import SLOT, NotMergeable
from lightning_peft.errors import AdapterError, CheckpointError
from lightning_peft.merging.certificate import QUANTISED, TOLERANCES, compare
from lightning_peft.merging.merging import MergeRefused, measure, merge
from lightning_peft.merging.quantised import opened
from lightning_peft.method import Method
from lightning_peft.methods import IA3, BitFit, DoRA, TrainableTokens
from tests.catalogue import METHODS
from tests.merging.test_combining import adapted, shake

Build = Callable[[str], Any]

HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def method_of(path: Path) -> list[Method]:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))["method"]
    return [instantiate(spec) for spec in config.values()]


def cells() -> list[Any]:
    """Return each method in two dtypes, one of them marked slow."""
    return [
        pytest.param(
            path,
            dtype,
            id=f"{path.stem}-{dtype}",
            marks=() if (i + j) % 2 else pytest.mark.slow,
        )
        for i, path in enumerate(METHODS)
        for j, dtype in enumerate(("float32", "bfloat16"))
    ]


def bits(model: nn.Module) -> dict[str, Tensor]:
    state = {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)}
    return {n: t.detach().clone().contiguous().view(torch.uint8) for n, t in state.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def trained(example: Any, methods: Any, name: str = "default", head: bool = True) -> Adapter:
    adapter = inject(example.model, methods, name, head=head)
    example.model.train()
    example.train(adapter.parameters())
    example.model.eval()
    return adapter


@pytest.mark.parametrize(("path", "dtype"), cells())
def test_every_method_is_merged_and_unmerged(path: Path, dtype: str, build: Build) -> None:
    example = build("bert")
    adapter = trained(example, method_of(path))
    example.model.to(HALF[dtype])
    before, tuned, names = bits(example.model), example.logits(), set(adapters_of(example.model))
    try:
        merged = merge(adapter, example.inputs)
    except NotMergeable:
        assert same(bits(example.model), before)
        assert torch.equal(example.logits(), tuned)
        return
    found = merged.certificate
    assert found.relative <= found.tolerance == TOLERANCES[dtype]
    assert not adapters_of(example.model)
    assert not any(SLOT in name for name in example.model.state_dict())
    assert found.absolute == compare([tuned], [example.logits()])[0]
    assert merge(adapter) is merged
    again = merged.unmerge()
    assert set(adapters_of(example.model)) == names
    assert same(bits(example.model), before)
    assert torch.equal(example.logits(), tuned)
    assert again.methods == adapter.methods
    if all(method.keeps_original for method in again.methods):
        again.remove()
        assert same(bits(example.model), bits(build("bert").model.to(HALF[dtype])))


def test_a_real_model_in_three_dtypes(minilm: Any) -> None:
    adapter = trained(minilm, LoRA(r=16))
    found = {name: measure(adapter, dtype, minilm.inputs) for name, dtype in HALF.items()}
    assert {name: certificate.dtype for name, certificate in found.items()} == {n: n for n in HALF}
    assert all(certificate.passed for certificate in found.values())
    assert found["float32"].relative < found["bfloat16"].relative
    assert found["float32"].effect > 1e-3
    assert found["float32"].rows == 2
    merged = merge(adapter, minilm.inputs)
    assert merged.certificate.relative == pytest.approx(found["float32"].relative, rel=0.5)


def test_a_merge_that_changes_too_much_is_undone(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = build("bert")
    adapter = adapted(example.model, "a", LoRA(), 0, head=True)
    before, tuned = bits(example.model), example.logits()
    monkeypatch.setitem(TOLERANCES, "float32", 1e-12)
    with pytest.raises(MergeRefused, match="1e-12 is the limit in float32") as refusal:
        merge(adapter, example.inputs)
    assert 0 < refusal.value.certificate.relative < 1e-4
    assert same(bits(example.model), before)
    assert torch.equal(example.logits(), tuned)
    assert adapter.active
    monkeypatch.undo()
    assert merge(adapter, example.inputs).certificate.passed


def test_a_change_that_a_dtype_cannot_hold_is_seen(build: Build) -> None:
    example = build("llama")
    adapter = adapted(example.model, "a", LoRA(), 0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(0.05)
    found = {n: measure(adapter, HALF[n], example.inputs) for n in ("float32", "bfloat16")}
    assert found["float32"].lost < 0.01
    assert found["bfloat16"].lost > 0.3


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (PromptTuning(), "what `prompt` does: keep the adapter beside"),
        ([LoRA(), PrefixTuning(tokens=2)], "`prefix` does: .* `lora` alone"),
        ([LoRA(), BottleneckAdapter()], "`bottleneck` does"),
        ([LoRA(targets="query"), DoRA(targets="query")], "do not simply add up"),
    ],
)
def test_what_no_weight_can_hold_is_named(methods: Any, message: str, build: Build) -> None:
    example = build("bert")
    adapter = trained(example, methods)
    before, tuned = bits(example.model), example.logits()
    with pytest.raises(NotMergeable, match=message):
        merge(adapter, example.inputs)
    assert same(bits(example.model), before)
    assert torch.equal(example.logits(), tuned)


def test_shared_weights(build: Build) -> None:
    example = build("gpt2")
    adapter = adapted(example.model, "a", LoRA(targets=["wte"]), 0)
    with pytest.raises(NotMergeable, match="shares its weight"):
        merge(adapter, example.inputs)
    adapter.remove()
    adapter = adapted(example.model, "rows", TrainableTokens(token_ids=[5]), 0)
    before = bits(example.model)
    merged = merge(adapter, example.inputs)
    assert example.model.lm_head.weight is example.model.transformer.wte.weight
    merged.unmerge()
    assert same(bits(example.model), before)


def test_an_inactive_one_is_refused_and_others_keep_their_part(build: Build) -> None:
    example = build("bert")
    a = adapted(example.model, "a", LoRA(), 0)
    b = adapted(example.model, "b", LoRA(r=2), 1)
    with pytest.raises(AdapterError, match="`a` is not active"):
        merge(a, example.inputs)
    alone = example.logits()
    merged = merge(b, example.inputs)
    assert not a.active
    torch.testing.assert_close(example.logits(), alone, rtol=1e-4, atol=1e-5)
    b = merged.unmerge()
    a.activate()
    both, state = example.logits(), bits(example.model)
    merged = merge(b, example.inputs)
    assert a.active
    torch.testing.assert_close(example.logits(), both, rtol=1e-4, atol=1e-5)
    merged.unmerge()
    assert a.active
    assert same(bits(example.model), state)


def test_a_parked_head_is_merged_and_comes_back(build: Build) -> None:
    example = build("bert")
    a = adapted(example.model, "a", [LoRA(), BitFit()], 0, head=True)
    b = adapted(example.model, "b", IA3(), 1, head=True)
    b.deactivate()
    a.activate()
    tuned, before = example.logits(), b.state_dict()["classifier.weight"].clone()
    merged = merge(a, example.inputs)
    torch.testing.assert_close(example.logits(), tuned, rtol=1e-4, atol=1e-5)
    a = merged.unmerge()
    assert torch.equal(example.logits(), tuned)
    assert torch.equal(b.state_dict()["classifier.weight"], before)
    a.remove()
    b.remove()
    assert same(bits(example.model), bits(build("bert").model))


def test_training_goes_on_after_unmerging(build: Build) -> None:
    example, other = build("bert"), build("bert")
    torch.manual_seed(0)
    one = merge(adapted(example.model, "a", LoRA(), 0, head=True), example.inputs).unmerge()
    torch.manual_seed(0)
    two = adapted(other.model, "a", LoRA(), 0, head=True)
    example.train(one.parameters())
    other.train(two.parameters())
    assert torch.equal(example.logits(), other.logits())


def test_a_model_that_went_on_is_not_put_back(build: Build) -> None:
    example = build("bert")
    merged = merge(adapted(example.model, "a", LoRA(), 0), example.inputs)
    again = inject(example.model, LoRA(), "b")
    with pytest.raises(AdapterError, match="other weights or other adapters"):
        merged.unmerge()
    again.remove()
    example.model.double()
    with pytest.raises(AdapterError, match="other weights or other adapters"):
        merged.unmerge()
    example = build("bert")
    merged = merge(adapted(example.model, "a", LoRA(), 0), example.inputs)
    merged.unmerge()
    with pytest.raises(AdapterError, match="not merged any more"):
        merged.unmerge()


def test_inputs_of_every_kind(build: Build) -> None:
    example = build("bert")
    adapter = adapted(example.model, "a", LoRA(), 0)
    merged = merge(adapter)  # the model's own few tokens
    assert merged.certificate.rows == 1
    merged = merge(merged.unmerge(), [example.inputs, example.inputs])
    assert merged.certificate.rows == 6
    example = build("mlp")
    adapter = adapted(example.model, "a", LoRA(targets="all-linear"), 0)
    with pytest.raises(AdapterError, match="`inputs` must be a batch"):
        merge(adapter)
    assert merge(adapter, example.inputs).certificate.passed
    assert merge(adapted(build("vit").model, "a", LoRA(), 0)).certificate.passed


def test_modes_and_generators_stay(build: Build) -> None:
    example = build("bert")
    adapter = adapted(example.model, "a", LoRA(), 0)
    example.model.train()
    modes, state = {n: m.training for n, m in example.model.named_modules()}, torch.get_rng_state()
    merge(adapter).unmerge()
    assert {n: m.training for n, m in example.model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_a_scale_is_merged_as_it_is(build: Build) -> None:
    example = build("bert")
    adapter = adapted(example.model, "a", LoRA(), 0)
    adapter.scale = 0.5
    half = example.logits()
    merged = merge(adapter, example.inputs)
    assert merged.certificate.scale == 0.5
    torch.testing.assert_close(example.logits(), half, rtol=1e-4, atol=1e-5)


def test_what_became_infinite_counts() -> None:
    masked = torch.tensor([1.0, float("-inf")])
    assert compare([masked], [masked.clone()]) == (0.0, 0.0)
    assert compare([masked], [torch.tensor([float("nan"), float("-inf")])])[1] == float("inf")
    assert compare([torch.tensor([3.0, 4.0])], [torch.tensor([3.0, 5.0])]) == (1.0, 0.2)
    assert compare([torch.zeros(2)], [torch.ones(2)]) == (1.0, float("inf"))


class Packed(nn.Parameter):
    """A weight in a format that nobody knows."""


def test_an_unknown_format_is_refused_by_name(build: Build) -> None:
    example = build("mlp")
    adapter = adapted(example.model, "a", LoRA(targets=["fc2"]), 0)
    weight = example.model.fc2.weight.data.to(torch.int8)
    example.model.fc2._parameters["weight"] = Packed(weight, requires_grad=False)
    example.model.fc2.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(NotMergeable, match=r"is a Packed of torch.int8.*`dequantize\(\)`"):
        merge(adapter, example.inputs)
    assert type(example.model.fc2.weight) is Packed


@pytest.mark.parametrize("kind", ["rows", "torchao"])
def test_quantised_bases(kind: str) -> None:
    """A quantised weight takes what its grid can hold; a refused one comes back bitwise."""
    module = quantised(kind).eval()
    adapter = adapted(module, "a", LoRA(r=4, targets="all-linear"), 0)
    x = {"x": torch.randn(64, 64)}
    with torch.no_grad():
        before = module(**x)
    merged = merge(adapter, x)
    assert merged.certificate.dtype == "quantised"
    assert merged.certificate.tolerance == QUANTISED
    assert 0 < merged.certificate.relative < 0.2 * merged.certificate.effect
    with torch.no_grad():
        after = module(**x)
    assert (
        type(module.inner.weight).__name__ == {"rows": "Int8Params", "torchao": "Int8Tensor"}[kind]
    )
    assert compare([before], [after])[1] == pytest.approx(merged.certificate.relative)
    merged.unmerge()
    with torch.no_grad():
        assert torch.equal(module(**x), before)


def test_four_bits_come_back_bitwise() -> None:
    module = quantised("blocks").eval()
    adapter = adapted(module, "a", LoRA(r=4, targets="all-linear"), 0)
    x = {"x": torch.randn(64, 64)}
    with torch.no_grad():
        before = module(**x)
    with contextlib.suppress(NotMergeable):  # too coarse for the change, or laid out for the CPU
        merge(adapter, x).unmerge()
    with torch.no_grad():
        assert torch.equal(module(**x), before)


def test_unchanged_weights_keep_their_codes() -> None:
    for kind in ("rows", "blocks", "torchao"):
        inner = quantised(kind).inner
        codes = inner.weight.data.qdata if kind == "torchao" else inner.weight.data
        codes = codes.clone()
        with opened(inner):
            assert inner.weight.dtype == torch.float32
            assert inner.weight.shape == (64, 64)
        again = inner.weight.data.qdata if kind == "torchao" else inner.weight.data
        assert torch.equal(again, codes)


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def quantised(kind: str) -> Any:
    plain = nn.Linear(64, 64)
    if kind == "torchao":
        ao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        module = Wrapper(plain)
        ao.quantize_(module, ao.Int8WeightOnlyConfig())
        return module
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    if kind == "blocks":
        blocks = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
        blocks.load_state_dict(plain.state_dict())
        return Wrapper(blocks.to("cpu"))
    rows = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    rows.load_state_dict(plain.state_dict())
    return Wrapper(rows.to("cpu"))


def biased(build: Build) -> Any:
    example = build("bert")
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in example.model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3, generator=generator)
    return example


@pytest.mark.parametrize("parked", [False, True], ids=["settled", "parked"])
@pytest.mark.parametrize(
    ("method", "other", "train", "name"),
    [
        (LoRA(targets="query"), LoRA(targets="key"), "re:.*query.weight", "query.weight"),
        (IA3(), BitFit(), (), "bias"),
    ],
    ids=["lora", "ia3"],
)
def test_what_another_trains_in_place_is_not_rewritten(
    method: Method, other: Method, train: str, name: str, parked: bool, build: Build
) -> None:
    example = biased(build)
    for each in ("b", "a") if parked else ("a", "b"):
        chosen = (method, ()) if each == "a" else (other, train)
        shake(inject(example.model, chosen[0], each, head=False, train=chosen[1]), ord(each))
    switch(example.model, ["a", "b"])
    a, b = (adapters_of(example.model)[each] for each in "ab")
    before, tuned = bits(example.model), example.logits()
    for refused in (a.merge, lambda: merge(a, example.inputs)):
        with pytest.raises(NotMergeable, match=rf"{name}` would be.* `b`|by Parked"):
            refused()  # type: ignore[no-untyped-call]
    assert same(bits(example.model), before)
    assert torch.equal(example.logits(), tuned)
    with b.disabled(), pytest.raises(NotMergeable, match="would be rewritten"):
        a.merge()
    b.merge()
    a.merge()
    torch.testing.assert_close(example.logits(), tuned, rtol=1e-4, atol=1e-5)


def test_biases_of_another_stay_where_a_change_leaves_them_alone(build: Build) -> None:
    example = biased(build)
    a = adapted(example.model, "a", LoRA(), 0)
    b = adapted(example.model, "b", BitFit(), 1)
    switch(example.model, ["a", "b"])
    tuned = example.logits()
    merge(a, example.inputs)
    torch.testing.assert_close(example.logits(), tuned, rtol=1e-4, atol=1e-5)
    assert b.active


def test_the_others_base_is_the_merged_one(build: Build, tmp_path: Path) -> None:
    example = build("bert")
    a = adapted(example.model, "a", LoRA(), 0)
    b = adapted(example.model, "b", LoRA(), 1)
    switch(example.model, ["a", "b"])
    before = b.base_fingerprint
    merged = merge(a, example.inputs)
    after = b.base_fingerprint
    assert after != before
    b.save(tmp_path / "b")
    with pytest.raises(CheckpointError, match="another base"):
        load_adapter(build("bert").model, tmp_path / "b")
    merged.unmerge()
    assert b.base_fingerprint == before


def _adds(weight: Tensor) -> None:
    weight.data.add_(0.5)


def _permutes(weight: Tensor) -> None:
    weight.copy_(weight.flip(0))


@torch.no_grad()
@pytest.mark.parametrize("change", [_adds, _permutes])
def test_later_changes_of_weights_are_not_discarded(change: Any, build: Build) -> None:
    example = build("bert")
    merged = merge(adapted(example.model, "a", LoRA(), 0), example.inputs)
    weight = example.model.bert.encoder.layer[1].attention.self.query.weight
    kept = weight.clone()
    change(weight)
    with pytest.raises(AdapterError, match=r"`bert\.encoder\.layer\.1.*query\.weight` and 0 more"):
        merged.unmerge()
    weight.copy_(kept)
    merged.unmerge()


def test_what_is_merged_stays_so_without_its_certificate(build: Build) -> None:
    example = build("bert")
    adapter = adapted(example.model, "a", LoRA(), 0, head=True)
    before = bits(example.model)
    merge(adapter, example.inputs)
    gc.collect()
    again = merge(adapter)
    twin = copy.deepcopy(again)
    with pytest.raises(AdapterError, match="not merged any more"):
        twin.unmerge()  # its way back leads into the first model
    again.unmerge()
    assert same(bits(example.model), before)


def test_adapters_with_heads_are_taken_out_in_the_reverse_order(build: Build) -> None:
    example = build("bert")
    base = bits(example.model)
    a, alone = adapted(example.model, "a", LoRA(), 0, head=True), example.logits()
    b = adapted(example.model, "b", LoRA(), 1, head=True)
    switch(example.model, "a")
    first = merge(a, example.inputs)
    switch(example.model, "b")
    on_merged = example.logits()
    merge(b, example.inputs).unmerge()
    assert torch.equal(example.logits(), on_merged)
    with torch.no_grad():
        example.model.classifier.weight.add_(1)  # of `b`, which is in place
    own = adapters_of(example.model)["b"].state_dict()
    own = {name: tensor.clone() for name, tensor in own.items()}
    first.unmerge()
    assert torch.equal(example.logits(), alone)
    state = adapters_of(example.model)["b"].state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in state.items())
    for name in "ab":
        adapters_of(example.model)[name].remove()
    assert same(bits(example.model), base)
