"""Learned keys and values inside attention: every kind of host, mask and way to generate."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft import Adapter, inject
from lightning_peft.delta import SLOT, Attending, Delta, attach, detach, slot_of
from lightning_peft.deltas.attention import uses_interface
from lightning_peft.errors import AdapterError
from lightning_peft.methods import PTuningV2

Build = Callable[[str], Any]

WITH_SDPA = ["bert", "roberta", "distilbert", "llama", "gpt2", "t5", "bart", "vit"]
CAUSAL = ["llama", "gpt2"]
PADDED_RIGHT = ["bert", "roberta", "distilbert", "t5", "bart", "encoder_with_head"]


def with_keys(model: nn.Module, scale: float = 1.0, **settings: Any) -> Adapter:
    """Inject learned keys that no attention can overlook."""
    adapter = inject(model, PTuningV2(**({"tokens": 5} | settings)), head=False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return adapter


def longest(example: Any, row: int) -> dict[str, Tensor]:
    """Return one row of the batch without its padding."""
    length = int(example.inputs["attention_mask"][row].sum())
    cut = {k: v[row : row + 1, :length] for k, v in example.inputs.items()}
    if "decoder_input_ids" in cut:
        cut["decoder_input_ids"] = example.inputs["decoder_input_ids"][row : row + 1]
    return cut


@pytest.mark.parametrize("name", WITH_SDPA)
def test_eager_equals_sdpa(name: str, build: Build) -> None:
    example = build(name)
    base = example.logits()
    with_keys(example.model)
    sdpa = example.logits()
    example.model.set_attn_implementation("eager")
    torch.testing.assert_close(example.logits(), sdpa, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(sdpa, base, atol=1e-3)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PADDED_RIGHT)
def test_padding_on_the_right_changes_nothing(name: str, implementation: str, build: Build) -> None:
    example = build(name)
    inner = example.model.encoder if name == "encoder_with_head" else example.model
    inner.set_attn_implementation(implementation)
    with_keys(example.model)
    together = example.logits()
    for row in range(3):
        with torch.no_grad():
            alone = example.model(**longest(example, row))
        alone = alone if isinstance(alone, Tensor) else alone[0]
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_a_decoder_changes_nothing(
    name: str, side: str, implementation: str, build: Build
) -> None:
    model = build(name).model
    model.set_attn_implementation(implementation)
    with_keys(model)
    ids, space = torch.arange(5, 10)[None], torch.zeros(1, 3, dtype=torch.long)
    parts = (space, ids) if side == "left" else (ids, space)
    padded, mask = torch.cat(parts, 1), torch.cat([p.clamp(max=1) for p in parts], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        alone = model(input_ids=ids).logits
        together = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(together[mask.bool()][None], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CAUSAL)
def test_no_token_sees_a_later_one(name: str, build: Build) -> None:
    model = build(name).model
    with_keys(model)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids[:, :6]).logits, model(input_ids=ids).logits[:, :6]
        )


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_sequences_stay_apart(implementation: str, build: Build) -> None:
    model = build("llama").model
    model.set_attn_implementation(implementation)
    with_keys(model)
    parts = [torch.arange(5, 10), torch.arange(20, 27)]
    packed = torch.cat(parts)[None]
    positions = torch.cat([torch.arange(len(p)) for p in parts])[None]
    with torch.no_grad():
        together = model(input_ids=packed, position_ids=positions, use_cache=False).logits[0]
        alone = torch.cat([model(input_ids=p[None]).logits[0] for p in parts])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 0},
    "static": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart"])
def test_generates_what_the_forward_pass_says(name: str, search: str, build: Build) -> None:
    if name == "gpt2" and search == "static":
        pytest.skip("GPT-2 in transformers takes no static cache")
    model = build(name).model
    with_keys(model)
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    settings = {"max_new_tokens": 6, "do_sample": False, **SEARCHES[search]}
    torch.manual_seed(0)
    cached = model.generate(ids, attention_mask=ids.clamp(max=1), **settings)
    torch.manual_seed(0)
    settings.pop("cache_implementation", None)
    again = model.generate(ids, attention_mask=ids.clamp(max=1), use_cache=False, **settings)
    assert torch.equal(cached, again)
    if search == "greedy":
        alone = model.generate(ids[:1, 2:], attention_mask=torch.ones(1, 3).long(), **settings)
        new = alone.shape[1] - (0 if model.config.is_encoder_decoder else 3)
        assert torch.equal(cached[0, -new:] if new < 7 else cached[0], alone[0, -new:])


def test_a_prompt_in_two_parts_is_the_prompt_in_one(build: Build) -> None:
    model = build("llama").model
    with_keys(model)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        first = model(input_ids=ids[:, :4], use_cache=True)
        second = model(input_ids=ids[:, 4:], past_key_values=first.past_key_values)
    joined = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(joined, whole, rtol=1e-4, atol=1e-5)


def test_computes_what_the_paper_says(build: Build) -> None:
    example = build("bert")
    model = example.model.double()
    adapter = with_keys(model, layers=[0])
    host = model.bert.encoder.layer[0].attention.self
    k, v = (p.detach() for _, p in sorted(slot_of(host)["default_p_tuning_v2"].named_parameters()))
    x = torch.randn(2, 6, 32, dtype=torch.float64)

    def heads(linear: nn.Module) -> Tensor:
        return linear(x).view(2, 6, 4, 8).transpose(1, 2)

    keys = torch.cat([k.expand(2, -1, -1, -1), heads(host.key)], 2)
    values = torch.cat([v.expand(2, -1, -1, -1), heads(host.value)], 2)
    shares = (heads(host.query) @ keys.transpose(2, 3) / math.sqrt(8)).softmax(-1)
    expected = (shares @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(host(x)[0], expected, rtol=1e-12, atol=1e-12)
    assert (k.shape, adapter.num_parameters) == ((4, 5, 8), 2 * 4 * 5 * 8)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_own_attention(masked: bool, options: dict[str, Any], batch_first: bool) -> None:
    torch.manual_seed(0)
    host = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options).requires_grad_(False)
    query, other = torch.randn(3, 4, 8), torch.randn(3, 5, 8)
    if not batch_first:
        query, other = query.transpose(0, 1), other.transpose(0, 1)
    masks = {
        "key_padding_mask": torch.zeros(3, 5).masked_fill(
            torch.arange(5) >= torch.tensor([[5], [3], [4]]), -math.inf
        ),
        "attn_mask": torch.randn(4, 5).masked_fill(torch.eye(4, 5).bool(), -math.inf),
    }
    settings = masks if masked else {}
    base, shares = host(query, other, other, **settings)
    model = nn.ModuleDict({"attention": host})
    adapter = with_keys(model)
    far = slot_of(host)["default_p_tuning_v2"]
    with torch.no_grad():
        far.key.zero_()
        far.value.zero_()
    mixed, theirs = host(query, other, other, **settings)
    assert theirs is not None
    assert theirs.shape[-1] == shares.shape[-1] + 5
    plain, none = host(query, other, other, need_weights=False, **settings)
    torch.testing.assert_close(plain, mixed)
    assert none is None
    # Zero values only take attention away, so what is left is proportional per head.
    assert (theirs[..., :5] > 0).all()
    torch.testing.assert_close(theirs.sum(-1), torch.ones_like(theirs.sum(-1)))
    with adapter.disabled():
        assert torch.equal(host(query, other, other, **settings)[0], base)


def test_unbatched_input_of_torchs_own_attention() -> None:
    host = nn.MultiheadAttention(8, 2, batch_first=True)
    with_keys(nn.ModuleDict({"attention": host}))
    x = torch.randn(4, 8)
    torch.testing.assert_close(host(x, x, x)[0], host(x[None], x[None], x[None])[0][0])
    torch.testing.assert_close(host(x, x, x)[1], host(x[None], x[None], x[None])[1][0])


class Twice(Delta):
    """Doubles what its host's attention gives."""

    def attend(self, host: nn.Module, base: Any, *args: Any, **kwargs: Any) -> Any:
        output, *rest = base(host, *args, **kwargs)
        return 2 * output, *rest


def test_deltas_attend_one_inside_the_other(build: Build) -> None:
    example = build("llama")
    host = example.model.model.layers[0].self_attn
    host.o_proj = nn.Identity()
    seen: list[Tensor] = []
    host.register_forward_hook(lambda m, a, o: seen.append(o[0]))
    example.logits()
    attach(host, "one", Twice())
    example.logits()
    attach(host, "two", Twice())
    example.logits()
    slot_of(host).let_act("one", False)
    example.logits()
    torch.testing.assert_close(seen[1], 2 * seen[0])
    torch.testing.assert_close(seen[2], 4 * seen[0])
    torch.testing.assert_close(seen[3], 2 * seen[0])
    detach(host, "one")
    detach(host, "two")
    example.logits()
    assert torch.equal(seen[4], seen[0])
    assert not isinstance(host, Attending)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("name", ["llama", "t5", "tagger"])
def test_two_prefixes_are_one_longer_prefix(name: str, build: Build) -> None:
    example, joined = build(name), build(name)
    one = inject(example.model, PTuningV2(tokens=3), "one", head=False)
    two = inject(example.model, PTuningV2(tokens=2), "two", head=False)
    one.activate()
    both = inject(joined.model, PTuningV2(tokens=5), head=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for a, b, c in zip(one.parameters(), two.parameters(), both.parameters(), strict=True):
            a.copy_(torch.randn(a.shape, generator=generator))
            b.copy_(torch.randn(b.shape, generator=generator))
            c.copy_(torch.cat([a, b], 1))
    torch.testing.assert_close(example.logits(), joined.logits(), rtol=1e-4, atol=1e-5)
    two.remove()
    one.remove()
    assert torch.equal(example.logits(), build(name).logits())


def test_only_classes_that_ask_the_interface_are_redirected(build: Build) -> None:
    model = build("llama").model
    asking = {type(m).__name__ for m in model.modules() if uses_interface(type(m))}
    assert asking == {"LlamaAttention"}
    plain = type(model.model.layers[0].self_attn).forward
    with_keys(model, layers=[0])
    first, second = (layer.self_attn for layer in model.model.layers)
    assert type(second).forward is plain
    assert type(first).forward is not plain
    assert type(copy.deepcopy(first)) is type(first)
    assert first.config is model.config


@pytest.mark.parametrize(
    ("name", "kwargs", "reason"),
    [
        ("flash_attention_2", {"sliding_window": 4}, "a sliding window"),
        ("flash_attention_2", {"cu_seq_lens_q": torch.tensor([0, 5])}, "packed sequences"),
        ("sdpa", {"cache": object()}, "a paged cache"),
        ("flex_attention", {"attention_mask": object()}, "masks of kind object"),
    ],
)
def test_what_would_drop_the_keys_is_refused(
    name: str, kwargs: dict[str, Any], reason: str, build: Build
) -> None:
    from transformers import AttentionInterface

    model = build("llama").model
    with_keys(model)
    host = model.model.layers[0].self_attn
    present = AttentionInterface._global_mapping.get(name)
    AttentionInterface.register(name, lambda *_, **__: None)
    try:
        model.config._attn_implementation_internal = name
        x, angles = torch.randn(1, 3, 32), (torch.ones(1, 3, 8), torch.zeros(1, 3, 8))
        with pytest.raises(AdapterError, match=f"cannot enter `{name}` attention with {reason}"):
            host(x, position_embeddings=angles, **{"attention_mask": None, **kwargs})
    finally:
        AttentionInterface.register(name, present)


def test_dropout_only_in_training(build: Build) -> None:
    example = build("bert")
    with_keys(example.model, dropout=0.5)
    assert torch.equal(example.logits(), example.logits())
    example.model.train()
    assert not torch.equal(example.logits(), example.logits())


def test_runs_under_autocast_and_in_half_precision(build: Build) -> None:
    for name in ("bert", "llama", "t5"):
        example = build(name)
        adapter = with_keys(example.model)
        full = example.logits()
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(example.logits().float(), full, rtol=0.1, atol=0.3)
        example.model.bfloat16()
        assert {p.dtype for p in adapter.parameters()} == {torch.float32}
        low = example.logits()
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low.float(), full, rtol=0.1, atol=0.3)
        F.mse_loss(example.output().float(), full).backward()
        assert {p.grad.dtype for p in adapter.parameters()} == {torch.float32}


def test_keys_end_in_the_slot_of_each_attention(build: Build) -> None:
    adapter = with_keys(build("t5").model)
    hosts = {name.split(f".{SLOT}.")[0] for name in adapter.named_parameters()}
    assert len(hosts) == 6
    assert {name.rpartition(".")[2] for name in hosts} == {"SelfAttention", "EncDecAttention"}
