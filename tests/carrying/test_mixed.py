"""Batches whose rows have different adapters: as if each row had been run with its own alone.

As in `test_every_method.py` each method runs on one kind of model that rotates; the others are
marked slow.
"""

import copy
import inspect
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from lightning_peft import (
    Adapter,
    BottleneckAdapter,
    LoRA,
    PrefixTuning,
    PromptTuning,
    inject,
    mixed,
    switch,
)
from lightning_peft.config import instantiate
from lightning_peft.errors import AdapterError, TargetError
from lightning_peft.method import Method
from lightning_peft.methods import IA3, BitFit, FullFineTuning
from tests.catalogue import METHODS
from tests.conftest import BERT, TINY, Example
from tests.test_every_method import REASONS, inapplicable, structure

Build = Callable[[str], Any]
Rows = Sequence[str | None]

KINDS = {"encoder": "bert", "decoder": "llama", "encoder-decoder": "t5", "vision": "vit"}
ROWS: Rows = ("a", None, "b", "a", "b", "b")
NO_STACK = "has no stack of layers to put adapters into"
NOT_KEPT = ("full",)
"""Methods whose YAML keeps no originals, so that there is no base beside them."""


def cells() -> list[Any]:
    turn = sum(b"mixed")
    return [
        pytest.param(
            path,
            kind,
            id=f"{path.stem}-{kind}",
            marks=() if kind == list(KINDS)[(turn + i) % 4] else pytest.mark.slow,
        )
        for i, path in enumerate(METHODS)
        for kind in KINDS
    ]


def methods_of(path: Path) -> list[Method]:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))["method"]
    found = []
    for spec in config.values():
        kept = {"keep_original": True} if "keep_original" in spec else {}
        found.append(instantiate(spec | kept))
    return found


def filled(example: Any, names: Rows, methods: Any) -> list[Adapter]:
    """Inject an adapter of each name, with values that change the outputs, all trainable."""
    adapters = []
    for i, name in enumerate(names):
        torch.manual_seed(i)
        adapter = inject(example.model, methods, str(name))
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.05)
        adapters.append(adapter)
    for adapter in adapters:
        adapter.requires_grad_()
    return adapters


def filled_or_skipped(example: Any, methods: Any) -> list[Adapter]:
    """Inject two adapters; skip where the model has nothing that the method could change."""
    try:
        return filled(example, "ab", methods)
    except TargetError as error:
        if not any(reason in str(error) for reason in (*REASONS, NO_STACK)):
            raise
        pytest.skip(str(error))


def widened(example: Any, rows: int) -> None:
    """Give the example as many rows, no two alike, and no cache."""
    wide = {}
    for name, x in example.inputs.items():
        many = torch.cat([x] * (-(-rows // len(x))))[:rows].clone()
        if name.endswith("input_ids") or name in ("ids", "source", "target"):
            for i in range(rows):
                many[i] = torch.where(many[i] > 0, (many[i] + 5 * i - 3) % 61 + 3, many[i])
        elif many.is_floating_point():
            many += torch.randn(many.shape, generator=torch.Generator().manual_seed(3)) * 0.3
        wide[name] = many
    example.inputs = wide
    if "use_cache" in inspect.signature(example.model.forward).parameters:
        example.inputs["use_cache"] = False


def one_by_one(example: Any, rows: Rows) -> Tensor:
    """Return the outputs of the rows, each with its adapter alone."""
    outputs = {}
    for name in dict.fromkeys(rows):
        switch(example.model, name or ())
        outputs[name] = example.logits()
    return torch.stack([outputs[name][i] for i, name in enumerate(rows)])


def gradients(adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    return {
        f"{adapter.name}.{n}": p.grad.clone()
        for adapter in adapters
        for n, p in adapter.named_parameters().items()
        if p.grad is not None
    }


def weighted(output: Tensor, rows: slice | Tensor = slice(None)) -> Tensor:
    """Return a loss to which each row adds by itself."""
    weights = torch.randn(output.shape[1:], generator=torch.Generator().manual_seed(5))
    return (output.float() * weights).pow(2)[rows].sum()


def alone(example: Any, rows: Rows, adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """Return the gradients of each adapter when its rows are run by themselves."""
    inputs = dict(example.inputs)
    example.model.zero_grad()
    for adapter in adapters:
        switch(example.model, adapter.name)
        own = torch.tensor([i for i, name in enumerate(rows) if name == adapter.name])
        example.inputs = {n: x[own] if torch.is_tensor(x) else x for n, x in inputs.items()}
        weighted(example.output()).backward()
    example.inputs = inputs
    found = gradients(adapters)
    example.model.zero_grad()
    return found


@pytest.mark.parametrize(("path", "kind"), cells())
def test_each_row_is_as_with_its_adapter_alone(path: Path, kind: str, build: Build) -> None:
    example = build(KINDS[kind])
    widened(example, len(ROWS))
    adapters = filled_or_skipped(example, methods_of(path))
    expected = one_by_one(example, ROWS)
    wanted = alone(example, ROWS, adapters)
    switch(example.model, "b")
    with mixed(example.model, ROWS):
        found = example.logits()
        weighted(example.output()).backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], one_by_one(example, [None] * len(ROWS))[0], atol=1e-4)
    torch.testing.assert_close(gradients(adapters), wanted, rtol=1e-3, atol=1e-5)


SEVERAL = (("a", "b"), ("b",), ("a", "b"), ("a",), (), ("b",))


@pytest.mark.parametrize(("path", "kind"), cells())
def test_rows_may_have_several_adapters(path: Path, kind: str, build: Build) -> None:
    """Beside UniPELT, which hands inputs and gates from module to module, in all its parts."""
    example = build(KINDS[kind])
    kinds = {"a": methods_of(path), "b": methods_of(path.with_name("unipelt.yaml"))}
    if reason := inapplicable(example, kinds["a"]):
        pytest.skip(reason)
    adapters = [inject(example.model, own, name, head=False) for name, own in kinds.items()]
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in (p for adapter in adapters for p in adapter.parameters()):
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    widened(example, len(SEVERAL))
    outputs = []
    for i, names in enumerate(SEVERAL):
        switch(example.model, names)
        outputs.append(example.logits()[i])
    with mixed(example.model, SEVERAL):
        found = example.logits()
    torch.testing.assert_close(found, torch.stack(outputs), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(
    "name", ["gpt2_classifier", "bart", "swin", "resnet", "cnn", "mlp", "tagger"]
)
@pytest.mark.parametrize(
    "method",
    [LoRA(r=2), BottleneckAdapter(size=4), BitFit(), FullFineTuning(keep_original=True)],
    ids=["lora", "bottleneck", "bitfit", "full"],
)
def test_other_models(name: str, method: Method, build: Build) -> None:
    example = build(name)
    widened(example, len(ROWS))
    adapters = filled_or_skipped(example, method)
    example.model.train()
    wanted = alone(example, ROWS, adapters)
    example.model.eval()  # the statistics of norms have been learnt on the way
    expected = one_by_one(example, ROWS)
    with mixed(example.model, ROWS):
        found = example.logits()
        example.model.train()
        weighted(example.output()).backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients(adapters), wanted, rtol=1e-3, atol=1e-5)


def trained_alone(name: str, build: Build, rows: Rows, adapter: str) -> dict[str, Tensor]:
    """Return an adapter's state after some steps on its rows, with no other beside it."""
    example = build(name)
    own = filled(example, "abcd"[: "abcd".index(adapter) + 1], LoRA(r=2))[-1]
    widened(example, len(rows))
    mine = torch.tensor([i for i, n in enumerate(rows) if n == adapter])
    example.inputs = {n: x[mine] if torch.is_tensor(x) else x for n, x in example.inputs.items()}
    switch(example.model, adapter)
    example.model.train()
    optimizer = torch.optim.AdamW(own.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        weighted(example.output()).backward()
        optimizer.step()
    return {n: t.clone() for n, t in own.state_dict().items()}


def test_adapters_trained_side_by_side_are_as_trained_alone(build: Build) -> None:
    example, rows = build("bert"), ["a", "c", None, "d", "b", "a", "d", "c"]
    adapters = filled(example, "abcd", LoRA(r=2))
    widened(example, len(rows))
    base = {k: t.clone() for k, t in example.model.state_dict().items() if "classifier" not in k}
    trained = [p for a in adapters for p in a.parameters()]
    assert len({id(p) for p in trained}) == len(trained)
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    example.model.train()
    for _ in range(3):
        optimizer.zero_grad()
        with mixed(example.model, rows):
            weighted(example.output()).backward()
        optimizer.step()
    for adapter in adapters:
        expected = trained_alone("bert", build, rows, adapter.name)
        torch.testing.assert_close(adapter.state_dict(), expected, rtol=1e-4, atol=1e-5)
    for key, tensor in base.items():
        if "lightning_peft" not in key:
            assert torch.equal(example.model.state_dict()[key], tensor), key


def test_who_has_no_row_stays_bitwise_as_it_was(build: Build) -> None:
    example = build("bert")
    adapters = filled(example, "abc", LoRA(r=2))
    widened(example, 4)
    others = {n: t.clone() for a in (adapters[0], adapters[2]) for n, t in a.state_dict().items()}
    optimizer = torch.optim.AdamW([p for a in adapters for p in a.parameters()], lr=1e-2)
    before = adapters[1].state_dict()["classifier.weight"].clone()
    with mixed(example.model, ["b", None, "b", None]):
        weighted(example.output()).backward()
    optimizer.step()
    now = {n: t for a in (adapters[0], adapters[2]) for n, t in a.state_dict().items()}
    assert all(torch.equal(now[n], t) for n, t in others.items())
    assert not torch.equal(adapters[1].state_dict()["classifier.weight"], before)


def test_leaves_the_model_as_it_was(build: Build) -> None:
    example = build("bert")
    filled(example, "ab", [LoRA(r=2), PromptTuning(tokens=3)])
    widened(example, 4)
    with mixed(example.model, ["a", "b", None, "a"]):
        pass
    before = structure(example.model)
    state = {k: t.clone() for k, t in example.model.state_dict().items()}
    tuned = example.logits()
    with pytest.raises(AdapterError, match="gets 4 rows"), mixed(example.model, ["a", "b", None]):
        example.logits()
    assert structure(example.model) == before
    assert list(example.model.state_dict()) == list(state)
    assert all(torch.equal(t, state[k]) for k, t in example.model.state_dict().items())
    assert torch.equal(example.logits(), tuned)


def test_contexts_lie_in_one_another(build: Build) -> None:
    example, outer, inner = build("bert"), ("a", None, "b"), ("b", "a", "a")
    filled(example, "ab", [LoRA(r=2), BitFit()])
    expected = one_by_one(example, outer), one_by_one(example, inner)
    with mixed(example.model, outer):
        with mixed(example.model, inner):
            torch.testing.assert_close(example.logits(), expected[1])
        torch.testing.assert_close(example.logits(), expected[0])
        with mixed(example.model, ["a"]):
            found = example.logits()
    switch(example.model, "a")
    torch.testing.assert_close(found, example.logits())


def test_a_row_with_several_adapters(build: Build) -> None:
    example = build("llama")
    filled(example, "ab", [LoRA(r=2), PrefixTuning(tokens=3)])
    switch(example.model, ("a", "b"))
    expected = example.logits()
    switch(example.model, "a")
    with mixed(example.model, [("a", "b"), "a", ("a", "b")]):
        found = example.logits()
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]])
    torch.testing.assert_close(found[1], example.logits()[1])


def test_what_is_refused(build: Build) -> None:
    example = build("bert")
    one, _ = filled(example, ["first", "second"], LoRA(r=2))
    with (
        pytest.raises(AdapterError, match="Did you mean `second`"),
        mixed(example.model, ["secnd"]),
    ):
        pass
    with pytest.raises(AdapterError, match="carries no adapter `x`"), mixed(example.model, ["x"]):
        pass
    with pytest.raises(AdapterError, match="is empty"), mixed(example.model, []):
        pass
    clash = mixed(example.model, [("first", "second"), None, None])
    with pytest.raises(AdapterError, match="trained in place"), clash:
        pass
    few = mixed(example.model, ["first", "second"])
    with pytest.raises(AdapterError, match=r"gets 3 rows, but there are 2 names"), few:
        example.logits()
    switch(example.model, "first")
    off = mixed(example.model, ["first", None, None])
    with one.disabled(), pytest.raises(AdapterError, match=r"`disabled\(\)`"), off:
        pass


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(
    "method",
    [LoRA(r=4), PrefixTuning(tokens=3), PromptTuning(tokens=3), [BottleneckAdapter(size=4), IA3()]],
    ids=["lora", "prefix", "prompt", "several"],
)
def test_generates_what_each_would(name: str, beams: int, method: Any, build: Build) -> None:
    example, rows = build(name), ["a", "b", "a"]
    adapters = filled(example, "ab", method)
    with torch.no_grad():
        for p in (p for a in adapters for p in a.parameters()):
            p.mul_(15)
    ids, mask = (example.inputs[key].flip(1) for key in ("input_ids", "attention_mask"))
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": beams, "do_sample": False}
    assert not torch.allclose(*one_by_one(example, ["a", "b"]), atol=1e-3)
    expected = {}
    for one in "ab":
        switch(example.model, one)
        expected[one] = example.model.generate(ids, attention_mask=mask, **settings)
    with mixed(example.model, rows):
        found = example.model.generate(ids, attention_mask=mask, **settings)
    for i, one in enumerate(rows):
        assert torch.equal(found[i], expected[one][i])


def test_samples(build: Build) -> None:
    example = build("llama")
    filled(example, "ab", LoRA(r=4))
    ids = example.inputs["input_ids"]
    with mixed(example.model, ["a", None, "b"]):
        found = example.model.generate(
            ids, max_new_tokens=4, min_new_tokens=4, do_sample=True, num_return_sequences=2
        )
    assert found.shape == (6, ids.shape[1] + 4)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_gives_states_of_several_lengths(name: str, build: Build) -> None:
    example, rows = build(name), ["a", None, "b"]
    filled(example, "a", PromptTuning(tokens=3, layout="peft"))
    filled(example, "b", PromptTuning(tokens=5))
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    settings |= {k: example.inputs[k] for k in ("input_ids", "attention_mask")}
    expected = []
    for i, one in enumerate(rows):
        switch(example.model, one or ())
        expected.append(example.model.generate(**settings)[i])
    with mixed(example.model, rows):
        assert torch.equal(example.model.generate(**settings), torch.stack(expected))


def test_ragged_prompts_need_a_pass_each_and_no_cache(build: Build) -> None:
    example, rows = build("llama"), ["a", None, "b"]
    filled(example, "a", PromptTuning(tokens=3))
    filled(example, "b", PromptTuning(tokens=5))
    expected = one_by_one(example, rows)
    settings = {"max_new_tokens": 5, "do_sample": False}
    settings |= {k: example.inputs[k] for k in ("input_ids", "attention_mask")}
    with mixed(example.model, rows):
        torch.testing.assert_close(example.logits(), expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(AdapterError, match="use_cache=False"):
            example.model.generate(**settings)
        found = example.model.generate(**settings, use_cache=False)
    for i, one in enumerate(rows):
        switch(example.model, one or ())
        assert torch.equal(found[i], example.model.generate(**settings)[i])


@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_layers_that_recompute(name: str, build: Build) -> None:
    example = build(name)
    widened(example, len(ROWS))
    adapters = filled(example, "ab", [LoRA(r=2), PrefixTuning(tokens=3), BottleneckAdapter(size=4)])
    example.model.train()
    with mixed(example.model, ROWS):
        weighted(example.output()).backward()
        plain = gradients(adapters)
        example.model.zero_grad()
        example.model.activation_checkpointing_enable()
        weighted(example.output()).backward()
    torch.testing.assert_close(gradients(adapters), plain, rtol=1e-5, atol=1e-6)


def test_under_autocast(build: Build) -> None:
    example = build("bert")
    widened(example, len(ROWS))
    adapters = filled(example, "ab", [LoRA(r=2), PrefixTuning(tokens=3)])
    with torch.autocast("cpu", torch.bfloat16):
        expected = one_by_one(example, ROWS)
        with mixed(example.model, ROWS):
            found = example.logits()
            weighted(example.output()).backward()
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)
    assert all(
        p.grad is not None and p.grad.isfinite().all() for a in adapters for p in a.parameters()
    )


def test_compiles_once_for_all_assignments(build: Build) -> None:
    example = build("llama")
    widened(example, len(ROWS))
    filled(example, "ab", LoRA(r=2))
    torch.compiler.reset()
    graphs = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(example.model, backend=count, fullgraph=True)
    others = ["b", "a", None, "a", None, "b"]
    for rows in (ROWS, others):
        expected = one_by_one(example, rows)
        with mixed(example.model, rows):
            torch.testing.assert_close(example.logits(compiled), expected, rtol=1e-4, atol=1e-5)
    assert graphs == 1


def test_copies_and_pickles_afterwards(build: Build) -> None:
    example = build("bert")
    filled(example, "ab", LoRA(r=2))
    with mixed(example.model, ["a", "b", None]):
        expected = example.logits()
    for twin in (copy.deepcopy(example.model), pickle.loads(pickle.dumps(example.model))):
        with mixed(twin, ["a", "b", None]):
            assert torch.equal(example.logits(twin), expected)


def _deberta() -> tuple[Any, int]:
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    config = DebertaV2Config(**BERT | relative)
    return DebertaV2ForSequenceClassification(config), 7


def _xlnet() -> tuple[Any, int]:
    from transformers import XLNetConfig, XLNetForSequenceClassification

    config = XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48, dropout=0.0)
    return XLNetForSequenceClassification(config), 8  # as many tokens as twice the rows


def _mixtral() -> tuple[Any, int]:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**TINY, num_key_value_heads=2, num_local_experts=4)), 7


def _bloom() -> tuple[Any, int]:
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)), 7


@pytest.mark.parametrize("make", [_deberta, _xlnet, _mixtral, _bloom])
@pytest.mark.parametrize(
    "method",
    [LoRA(r=2), PrefixTuning(tokens=3), FullFineTuning(keep_original=True)],
    ids=["lora", "prefix", "full"],
)
def test_models_that_do_not_put_the_rows_first_everywhere(make: Any, method: Method) -> None:
    rows = ["a", None, "b", "a"]
    torch.manual_seed(0)
    model, tokens = make()
    inputs: dict[str, Any] = {"input_ids": torch.randint(5, 60, (len(rows), tokens))}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    example = Example("", model.eval(), inputs)
    filled(example, "ab", method)
    expected = one_by_one(example, rows)
    with mixed(model, rows):
        torch.testing.assert_close(example.logits(), expected, rtol=1e-4, atol=1e-5)


def test_attention_that_takes_tokens_first_is_refused() -> None:
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    inject(model, LoRA(r=2), "a")
    refused = mixed(model, ["a", None])
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn.*batch_first=True"), refused:
        pass
