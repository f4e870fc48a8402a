"""Virtual tokens enter every kind of core, stand where they should, and leave again."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import StaticCache

from lightning_peft import inject, switch
from lightning_peft.errors import AdapterError, TargetError
from lightning_peft.methods.p_tuning import PTuning
from lightning_peft.methods.prompt_tuning import PromptTuning

Build = Callable[[str], Any]
N = 5
IDS = torch.tensor([[5, 9, 33, 12, 7, 41, 8], [11, 3, 60, 5, 28, 14, 9]])
DECODERS = ["llama", "gpt2"]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}


def tuned(build: Build, name: str, **settings: Any) -> Any:
    """A model in float64 with a prompt that says much."""
    model = build(name).model.double()
    adapter = inject(model, PromptTuning(tokens=N, **settings))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.5)
    return model


def padded(side: str, count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """The first row beside the second with some of it padded: ids, mask, positions."""
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    at = slice(0, count) if side == "left" else slice(len(IDS[0]) - count, None)
    ids[1], mask[1, at] = ids[1].roll(count) if side == "left" else ids[1], 0
    ids[mask == 0] = 0
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [*DECODERS, "gpt2_classifier", "bert", "roberta", "distilbert"])
def test_a_padded_row_computes_what_it_does_alone(name: str, side: str, build: Build) -> None:
    model = tuned(build, name)
    reads_first = name in ("bert", "roberta", "distilbert")
    if side == "left" and reads_first:
        pytest.skip("heads of encoders read the first token, which would be padding")
    ids, mask, positions = padded(side)
    given = {} if reads_first else {"position_ids": positions}
    beside = model(input_ids=ids, attention_mask=mask, **given).logits[1]
    alone = model(input_ids=ids[1:, mask[1] == 1]).logits[0]
    close(beside[mask[1] == 1] if beside.dim() > 1 else beside, alone)


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_decoder_attends_to_the_tokens_of_a_padded_row(
    name: str, side: str, build: Build
) -> None:
    if (name, side) == ("bart", "left"):
        pytest.skip("BART's positions count padding")
    model = tuned(build, name)
    ids, mask, _ = padded(side)
    decoder = {"decoder_input_ids": IDS[:, :3]}
    beside = model(input_ids=ids, attention_mask=mask, **decoder).logits[1:]
    alone = model(input_ids=ids[1:, mask[1] == 1], decoder_input_ids=IDS[1:, :3]).logits
    close(beside, alone)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize(
    "settings",
    [
        GREEDY,
        GREEDY | {"num_beams": 3},
        {"do_sample": True, "max_new_tokens": 6},
        GREEDY | {"prompt_lookup_num_tokens": 2},
        GREEDY | {"prefill_chunk_size": 3},
    ],
    ids=["greedy", "beam", "sample", "lookup", "chunked"],
)
def test_what_is_written_with_a_cache_is_what_is_written_without(
    name: str, settings: dict[str, Any], build: Build
) -> None:
    model, ids = tuned(build, name), IDS
    mask = torch.ones_like(ids)
    if "prompt_lookup_num_tokens" in settings:
        ids, mask = ids[:1].repeat(1, 2), mask[:1].repeat(1, 2)
    torch.manual_seed(1)
    cached = model.generate(ids, attention_mask=mask, **settings)
    plain = {k: v for k, v in settings.items() if k in ("do_sample", "max_new_tokens", "num_beams")}
    torch.manual_seed(1)
    again = model.generate(ids, attention_mask=mask, use_cache=False, **plain)
    assert torch.equal(cached, again)


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_output_is_the_forward_passs(name: str, build: Build) -> None:
    model = tuned(build, name)
    ids = IDS
    for _ in range(6):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    mask = torch.ones_like(IDS)
    assert torch.equal(model.generate(IDS, attention_mask=mask, **GREEDY, eos_token_id=None), ids)


@pytest.mark.parametrize("name", DECODERS)
def test_a_padded_batch_writes_what_each_row_does_alone(name: str, build: Build) -> None:
    model = tuned(build, name)
    ids, mask, _ = padded("left")
    settings = GREEDY | {"eos_token_id": None}
    both = model.generate(ids, attention_mask=mask, **settings)[:, -6:]
    alone = [model.generate(ids[i : i + 1, mask[i] == 1], **settings)[0, -6:] for i in (0, 1)]
    assert torch.equal(both, torch.stack(alone))


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("pad", [False, True])
def test_a_static_cache_must_have_room(name: str, pad: bool, build: Build) -> None:
    model = tuned(build, name)
    ids, mask, _ = padded("left") if pad else (IDS, torch.ones_like(IDS), None)
    settings = GREEDY | {"attention_mask": mask, "disable_compile": True, "eos_token_id": None}
    expected = model.generate(ids, **settings)
    cache = StaticCache(model.config, max_cache_len=7 + 6 + N)
    assert torch.equal(model.generate(ids, past_key_values=cache, **settings), expected)
    short = StaticCache(model.config, max_cache_len=7 + N - 1)
    with pytest.raises(AdapterError, match=r"static cache holds 11 tokens.*5 larger"):
        model.generate(ids, past_key_values=short, **settings)


def test_going_on_from_a_cache_takes_the_new_tokens_only(build: Build) -> None:
    model = tuned(build, "llama")
    mask = torch.ones_like(IDS)
    first = model(input_ids=IDS[:, :4], attention_mask=mask[:, :4], use_cache=True)
    rest = model(
        input_ids=IDS[:, 4:], attention_mask=mask, past_key_values=first.past_key_values
    ).logits
    close(rest, model(input_ids=IDS).logits[:, 4:])
    cache = model(input_ids=IDS[:, :4], use_cache=True).past_key_values
    on = model.generate(IDS[:, 4:], attention_mask=mask, past_key_values=cache, **GREEDY)
    assert torch.equal(on[:, 3:], model.generate(IDS, attention_mask=mask, **GREEDY)[:, 7:])
    cache = model(input_ids=IDS[:, :4], use_cache=True).past_key_values
    with pytest.raises(AdapterError, match="pass the new tokens only"):
        model.generate(IDS, attention_mask=mask, past_key_values=cache, **GREEDY)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_writes_the_same_with_and_without_a_cache(
    name: str, build: Build
) -> None:
    model = tuned(build, name)
    ids, mask, _ = padded("right")
    for settings in (GREEDY, GREEDY | {"num_beams": 2}):
        written = model.generate(ids, attention_mask=mask, **settings)
        again = model.generate(ids, attention_mask=mask, use_cache=False, **settings)
        assert torch.equal(written, again)


@pytest.mark.parametrize("name", ["bert_base", "llama", "gpt2", "t5", "bart", "vit"])
@pytest.mark.parametrize("as_dict", [True, False])
def test_outputs_have_the_length_of_the_text(name: str, as_dict: bool, build: Build) -> None:
    example = build(name)
    example.model.set_attn_implementation("eager")
    given = example.inputs | {
        "output_hidden_states": True, "output_attentions": True, "return_dict": as_dict
    }  # fmt: skip
    with torch.no_grad():
        base = example.model(**given)
        inject(example.model, PromptTuning(tokens=N))
        tuned = example.model(**given)
    assert type(tuned) is type(base)
    if not as_dict:
        own, their = dict(enumerate(tuned)), dict(enumerate(base))
    else:  # a decoder attends to the encoder's states, which keep the tokens
        other = ("encoder_", "cross_")
        own = {k: v for k, v in tuned.items() if not k.startswith(other)}
        their = {k: v for k, v in base.items() if not k.startswith(other)}
    if as_dict or name not in ("t5", "bart"):
        assert {k: shapes(v) for k, v in own.items()} == {k: shapes(v) for k, v in their.items()}


def shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return [shapes(v) for v in value] if isinstance(value, tuple) else type(value)


@pytest.mark.parametrize("name", ["llama", "bert_base", "t5"])
def test_given_embeddings_are_as_good_as_ids(name: str, build: Build) -> None:
    model = tuned(build, name)
    core = model.get_encoder() if name == "t5" else model
    ids, mask, _ = padded("right")
    embedded = core.get_input_embeddings()(ids)
    decoder = {"decoder_input_ids": IDS[:, :3]} if name == "t5" else {}
    by_ids = model(input_ids=ids, attention_mask=mask, **decoder)[0]
    by_vectors = model(inputs_embeds=embedded, attention_mask=mask, **decoder)[0]
    assert torch.equal(by_ids, by_vectors)


def test_labels_are_those_of_the_text(build: Build) -> None:
    model = tuned(build, "llama")
    out = model(input_ids=IDS, labels=IDS)
    expected = nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1).float(), IDS[:, 1:].flatten()
    )
    torch.testing.assert_close(out.loss, expected)


def test_only_the_position_of_a_head_differs_between_layouts(build: Build) -> None:
    outputs = {}
    for layout in ("clean", "peft"):
        torch.manual_seed(3)
        model = tuned(build, "bert", layout=layout)
        outputs[layout] = model(input_ids=IDS).logits
    assert not torch.allclose(outputs["clean"], outputs["peft"])
    for name in ("llama", "t5"):
        logits = []
        for layout in ("clean", "peft"):
            example = build(name)
            torch.manual_seed(3)
            inject(example.model, PromptTuning(tokens=N, layout=layout))
            logits.append(example.logits())
        assert torch.equal(*logits)


def test_words_may_stand_among_the_tokens(build: Build) -> None:
    example = build("llama")
    model = example.model.double()
    torch.manual_seed(0)
    adapter = inject(model, PTuning(tokens=4, anchor_ids=[9, 17]))
    (virtual,) = [delta for _, _, delta in adapter.deltas if list(delta.parameters())]
    vectors = virtual.vectors()
    words = model.get_input_embeddings()
    rows = torch.cat([vectors[:2], words(torch.tensor([9, 17])), vectors[2:]])
    tuned = model(input_ids=IDS).logits
    with adapter.disabled():
        by_hand = torch.cat([rows.expand(2, -1, -1), words(IDS)], 1)
        close(tuned, model(inputs_embeds=by_hand).logits[:, 6:])


def test_two_adapters_put_their_tokens_into_one_text(build: Build) -> None:
    model = build("llama").model.double()
    vectors = []
    for name, count in (("one", 3), ("two", 2)):
        adapter = inject(model, PromptTuning(tokens=count), name)
        vectors.insert(0, adapter.parameters()[0])
    switch(model, ["one", "two"])
    both = model(input_ids=IDS).logits
    written = model.generate(IDS, attention_mask=torch.ones_like(IDS), **GREEDY)
    assert both.shape[1] == IDS.shape[1]
    base = build("llama").model.double()
    by_hand = torch.cat(vectors).expand(2, -1, -1)
    by_hand = torch.cat([by_hand, base.get_input_embeddings()(IDS)], 1)
    close(both, base(inputs_embeds=by_hand).logits[:, 5:])
    plain = model.generate(IDS, attention_mask=torch.ones_like(IDS), use_cache=False, **GREEDY)
    assert torch.equal(written, plain)


def test_threads_do_not_meet(build: Build) -> None:
    model = tuned(build, "llama")
    texts = [IDS[:, :length] for length in (3, 4, 5, 6, 7) for _ in range(4)]
    with torch.no_grad():
        expected = [model(input_ids=ids).logits for ids in texts]
    found: list[Any] = [None] * len(texts)

    def run(i: int) -> None:
        with torch.no_grad():
            found[i] = model(input_ids=texts[i]).logits

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own, alone in zip(found, expected, strict=True):
        close(own, alone)


def test_learned_positions_are_not_exceeded(build: Build) -> None:
    model = tuned(build, "gpt2")
    assert model(input_ids=IDS[:1].repeat(1, 5)).logits.shape[1] == 35
    with pytest.raises(AdapterError, match=r"40 learned positions: cut the text at 35 tokens"):
        model(input_ids=IDS[:1].repeat(1, 6))
    with pytest.raises(TargetError, match="must leave places"):
        inject(build("gpt2").model, PromptTuning(tokens=40))


@pytest.mark.parametrize(
    ("name", "why"),
    [("resnet", "grid"), ("swin", "grid"), ("cnn", "neither"), ("mlp", "neither")],
)
def test_what_has_no_sequence_is_refused(name: str, why: str, build: Build) -> None:
    with pytest.raises(TargetError, match=why):
        inject(build(name).model, PromptTuning())


def test_a_text_tower_reads_its_last_word(build: Build) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    for eos in (2, 63):
        torch.manual_seed(0)
        config = CLIPTextConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=48, max_position_embeddings=40, eos_token_id=eos, bos_token_id=1,
        )  # fmt: skip
        model = CLIPTextModel(config).eval()
        ids = torch.cat([IDS, torch.full((2, 1), 63)], 1)
        inject(model, PromptTuning(tokens=N))
        out = model(input_ids=ids)
        assert out.last_hidden_state.shape == (2, 8, 32)
        assert torch.equal(out.pooler_output, out.last_hidden_state[:, -1])


def test_a_static_cache_that_fills_up_in_generation_is_refused_by_name(build: Build) -> None:
    example = build("llama")
    inject(example.model, PromptTuning(tokens=3))
    ids = torch.full((1, 5), 7)
    with pytest.raises(AdapterError, match=r"static cache holds 10 tokens"):
        example.model.generate(
            ids, max_new_tokens=6, min_new_tokens=6, cache_implementation="static"
        )
