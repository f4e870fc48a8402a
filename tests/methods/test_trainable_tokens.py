"""Trainable tokens: chosen rows of a table, tied heads, and the whole table."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_peft import inject, load_adapter
from lightning_peft.carrying.registry import adapters_of
from lightning_peft.delta import NotMergeable
from lightning_peft.errors import AdapterError, ConfigError, TargetError
from lightning_peft.methods.trainable_tokens import TrainableTokens
from tests.methods.peft_reference import QUIET, assert_same, peft

Build = Callable[[str], Any]

pytestmark = QUIET


def rename(end: str) -> str:
    return {"trainable_tokens": "trainable_tokens_delta.default"}[end]


@pytest.mark.parametrize(
    ("model", "table"),
    [
        ("bert", "word_embeddings"),
        ("llama", "embed_tokens"),
        ("gpt2", "wte"),
        ("gpt2_classifier", "wte"),
    ],
)
def test_equals_pefts(model: str, table: str, build: Build) -> None:
    example = build(model)
    chosen = sorted([30, 7, *example.inputs["input_ids"][0, :3].tolist()])  # as ours keeps them
    config = peft.TrainableTokensConfig(token_indices=chosen, target_modules=[table])
    assert_same(example, TrainableTokens(token_ids=chosen), config, rename)


def test_only_chosen_tokens_change(build: Build) -> None:
    model = build("llama").model
    adapter = inject(model, TrainableTokens(token_ids=[5, 9]))
    with torch.no_grad():
        adapter.parameters()[0].add_(1.0)
    ids = torch.tensor([[5, 8, 9, 63, 0]])
    vectors = model.model.embed_tokens(ids)[0] - model.model.embed_tokens.weight[ids[0]]
    assert torch.equal(vectors.abs().sum(1) > 0, torch.tensor([True, False, True, False, False]))
    assert adapter.num_parameters == 2 * 32
    assert [name for name, _, _ in adapter.deltas] == ["model.embed_tokens"]


@pytest.mark.parametrize("name", ["gpt2", "t5", "bart"])
def test_a_tied_head_speaks_with_the_new_rows_and_can_be_merged(name: str, build: Build) -> None:
    example = build(name)
    chosen = example.inputs["input_ids"][0, :3].tolist()
    adapter = inject(example.model, TrainableTokens(token_ids=chosen), head=False)
    assert len(adapter.parameters()) == 1
    with torch.no_grad():
        adapter.parameters()[0].normal_()
    tuned, twin = example.logits(), copy.deepcopy(example.model)
    assert adapters_of(twin)["default"].num_parameters == adapter.num_parameters
    weight = adapter.parameters()[0].detach().clone()
    merged = adapter.merge()
    torch.testing.assert_close(merged.get_input_embeddings().weight[sorted(chosen)], weight)
    torch.testing.assert_close(example.logits(), tuned, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(example.logits(twin), tuned)
    with torch.no_grad():
        adapters_of(twin)["default"].parameters()[0].zero_()
    assert not torch.allclose(example.logits(twin), tuned, atol=1e-3)


def test_without_ids_the_whole_table_is_trained_in_place(build: Build) -> None:
    assert inject(build("t5").model, TrainableTokens(), head=False).in_place == ["shared.weight"]
    model = build("encoder_with_head").model
    names = inject(model, TrainableTokens(), head=False).in_place
    assert names == ["encoder.embeddings.word_embeddings.weight"]


def test_a_named_table(build: Build) -> None:
    method = TrainableTokens(token_ids=[1], targets="position_embeddings")
    adapter = inject(build("bert").model, method, head=False)
    assert [n for n, _, _ in adapter.deltas] == ["bert.embeddings.position_embeddings"]
    with pytest.raises(ConfigError, match=r"must lie in \[0, 40\), the rows .* but 41 does not"):
        inject(
            build("bert").model, TrainableTokens(token_ids=[3, 41], targets="position_embeddings")
        )
    with pytest.raises(TargetError, match="this method changes Embedding"):
        inject(build("bert").model, TrainableTokens(token_ids=[3], targets="query"))


@pytest.mark.parametrize("name", ["vit", "resnet", "mlp"])
def test_a_model_without_tokens_is_refused(name: str, build: Build) -> None:
    for method in (TrainableTokens(), TrainableTokens(token_ids=[1])):
        with pytest.raises(TargetError, match="has no table of token embeddings"):
            inject(build(name).model, method)


@pytest.mark.parametrize("ids", [[], [1, 1], [-1, 2]])
def test_ids_must_be_different_and_not_negative(ids: list[int]) -> None:
    with pytest.raises(ConfigError, match="`token_ids` must be different ids from 0 on, or None"):
        TrainableTokens(token_ids=ids)


def test_rows_without_values_are_refused(build: Build) -> None:
    with pytest.raises(AdapterError, match="fill the model first"):
        inject(build("llama").model.to("meta"), TrainableTokens(token_ids=[1]))


def test_rows_replace_what_a_resized_table_starts_with(build: Build) -> None:
    """The rows of added tokens are random: an adapter must not depend on what they were."""
    example = build("llama")
    adapter = inject(example.model, TrainableTokens(token_ids=[60, 61]))
    with torch.no_grad():
        adapter.parameters()[0].normal_()
    ids = torch.tensor([[60, 61]])
    before = example.model.model.embed_tokens(ids)
    with torch.no_grad():
        example.model.model.embed_tokens._parameters["weight"][60:62] = 7.0
    torch.testing.assert_close(example.model.model.embed_tokens(ids), before)


def test_not_merged_beside_another_change_of_the_table(build: Build) -> None:
    from lightning_peft import LoRA

    both = [TrainableTokens(token_ids=[1]), LoRA(targets="embed_tokens")]
    adapter = inject(build("llama").model, both)
    with pytest.raises(NotMergeable, match="do not simply add up"):
        adapter.merge()


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_rows_survive_copies_compilation_checkpointing_and_generation(
    name: str, build: Build, tmp_path: Path
) -> None:
    example = build(name)
    chosen = example.inputs["input_ids"][0, :4].tolist()
    adapter = inject(example.model, TrainableTokens(token_ids=chosen), head=False)
    with torch.no_grad():
        adapter.parameters()[0].normal_()
    output = example.logits()
    assert torch.equal(example.logits(pickle.loads(pickle.dumps(example.model))), output)
    torch.compiler.reset()
    compiled = torch.compile(example.model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(example.logits(compiled), output, rtol=1e-5, atol=1e-6)
    other = build(name)
    load_adapter(other.model, adapter.save(tmp_path / "adapter"))
    assert torch.equal(other.logits(), output)
    example.output().square().mean().backward()
    gradient = adapter.parameters()[0].grad.clone()
    example.model.zero_grad()
    example.model.train().activation_checkpointing_enable()
    example.output().square().mean().backward()
    torch.testing.assert_close(adapter.parameters()[0].grad, gradient, rtol=1e-5, atol=1e-7)
    assert torch.equal(gradient.abs().sum(1) > 0, torch.ones(4, dtype=torch.bool))
    example.model.eval()
    settings = {"max_new_tokens": 4, "do_sample": False}
    ids = example.inputs["input_ids"][:1]
    cached = example.model.generate(ids, **settings)
    assert torch.equal(cached, example.model.generate(ids, use_cache=False, **settings))
