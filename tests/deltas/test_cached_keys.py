"""Learned keys and values in the cache: they act as a text that was read before."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_peft import inject
from lightning_peft.deltas.cached_keys import CachedKeys, order_of
from lightning_peft.errors import AdapterError, ConfigError, TargetError
from lightning_peft.methods import PrefixTuning

Build = Callable[[str], Any]
N = 4
MODELS = ("llama", "gpt2", "bert", "t5", "bart", "encoder_with_head")


def injected(build: Build, name: str, **settings: Any) -> Any:
    example = build(name)
    example.adapter = inject(example.model, PrefixTuning(tokens=N, layout="peft", **settings))
    return example


def test_it_equals_a_cache_that_a_text_left(build: Build) -> None:
    example = build("llama")
    text = torch.tensor([[5, 9, 33, 12], [5, 9, 33, 12], [5, 9, 33, 12]])
    with torch.no_grad():
        read = example.model(torch.cat([text, example.inputs["input_ids"]], 1)).logits[:, N:]
        adapter = inject(
            example.model, PrefixTuning(tokens=N, layout="peft", start_ids=text[0].tolist())
        )
        torch.testing.assert_close(example.model(example.inputs["input_ids"]).logits, read)
    assert [type(delta) for _, _, delta in adapter.deltas] == [CachedKeys]


@pytest.mark.parametrize("bottleneck", [None, 6])
@pytest.mark.parametrize("name", MODELS)
def test_everything_declared_learns_and_leaves_again(
    name: str, bottleneck: int | None, build: Build
) -> None:
    example = build(name)
    bare = example.logits()
    example.adapter = inject(
        example.model, PrefixTuning(tokens=N, layout="peft", bottleneck=bottleneck), head=False
    )
    before = {n: p.detach().clone() for n, p in example.adapter.named_parameters().items()}
    example.train(example.adapter.parameters())
    tuned = example.logits()
    assert not torch.allclose(tuned, bare, rtol=1e-3)
    moved = {n for n, p in example.adapter.named_parameters().items() if (p != before[n]).any()}
    assert moved == set(before)
    for copied in (copy.deepcopy(example.model), pickle.loads(pickle.dumps(example.model))):
        assert torch.equal(example.logits(copied), tuned)
    with example.adapter.disabled():
        assert torch.equal(example.logits(), bare)
    example.adapter.remove()
    assert torch.equal(example.logits(), bare)


def test_layers_of_an_encoder_decoder_share_as_in_peft() -> None:
    assert order_of(3, crossing=False) == [0, 1, 2]
    assert order_of(3, crossing=True) == [0, 2, 1]
    assert order_of(4, crossing=True) == [0, 2, 0, 2]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_left_padding_and_positions(name: str, build: Build) -> None:
    example = injected(build, name)
    ids = example.inputs["input_ids"][:1]
    with torch.no_grad():
        alone = example.model(ids).logits
        padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
        mask = (torch.arange(padded.shape[1]) >= 3).long()[None]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        beside = example.model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(beside, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_what_is_written_step_by_step_is_what_a_forward_pass_gives(name: str, build: Build) -> None:
    example = injected(build, name)
    ids = example.inputs["input_ids"][::2]  # the rows without padding
    written = example.model.generate(
        ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    whole: dict[str, Tensor] = {"input_ids": ids, "decoder_input_ids": written.sequences}
    if name != "t5":
        whole = {"input_ids": written.sequences}
    with torch.no_grad():
        logits = example.model(**whole).logits[:, -6:-1]
    stepped = torch.stack(written.logits, 1)
    torch.testing.assert_close(stepped, logits, rtol=1e-4, atol=1e-5)


def test_one_tensor_serves_each_thread_and_call(build: Build) -> None:
    example = injected(build, "llama")
    first = example.logits()
    assert torch.equal(example.logits(), first)
    assert not any("cache" in name for name in vars(example.adapter.deltas[0][2]))


def test_checkpointing_drops_the_cache_and_is_refused(build: Build) -> None:
    example = injected(build, "llama")
    example.model.activation_checkpointing_enable()
    example.logits()  # in eval mode nothing is dropped
    example.model.train()
    with pytest.raises(AdapterError, match=r"gradient checkpointing.*layout='clean'"):
        example.output()


def test_a_static_cache_is_refused(build: Build) -> None:
    example = injected(build, "llama")
    ids = example.inputs["input_ids"]
    with pytest.raises(AdapterError, match="static"):
        example.model.generate(ids, cache_implementation="static", max_new_tokens=2)


def test_a_mask_that_counts_what_is_in_the_cache_is_refused(build: Build) -> None:
    example = injected(build, "llama")
    ids, mask = example.inputs["input_ids"], example.inputs["attention_mask"]
    cache = example.model(ids, use_cache=True).past_key_values
    more = torch.ones(len(ids), 1, dtype=torch.long)
    example.model(ids[:, :1], past_key_values=cache, attention_mask=torch.cat([mask, more], 1))
    wrong = torch.ones(len(ids), N + 9, dtype=torch.long)
    with pytest.raises(AdapterError, match=r"behind 4 learned keys, and 1 follow, .* covers 13"):
        example.model(ids[:, :1], past_key_values=cache, attention_mask=wrong)


def test_the_room_for_positions_is_counted(build: Build) -> None:
    model = injected(build, "gpt2").model
    model(torch.ones(1, 36, dtype=torch.long))
    with pytest.raises(AdapterError, match=r"has 37 tokens, with 4 .* 40 .* cut the text at 36"):
        model(torch.ones(1, 37, dtype=torch.long))
    with pytest.raises(TargetError, match="must leave places"):
        inject(build("gpt2").model, PrefixTuning(tokens=40, layout="peft"))


@pytest.mark.parametrize("name", ["distilbert", "vit", "mlp"])
def test_models_without_a_cache_are_refused(name: str, build: Build) -> None:
    with pytest.raises(TargetError, match=r"takes no cache|reads no text"):
        inject(build(name).model, PrefixTuning(layout="peft"))


@pytest.mark.parametrize("settings", [{"layers": [0]}, {"targets": "attn"}, {"gating": "token"}])
def test_settings_that_speak_of_attention_modules_are_refused(settings: Any) -> None:
    with pytest.raises(ConfigError, match="`layout` must be 'clean' beside"):
        PrefixTuning(layout="peft", **settings)
    with pytest.raises(ConfigError, match="`layout` must be clean or peft"):
        PrefixTuning(layout="other")  # type: ignore[arg-type]


def test_a_compiled_model_gives_the_same(build: Build) -> None:
    example = injected(build, "llama")
    compiled = torch.compile(example.model, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**example.inputs)[0], example.output())
