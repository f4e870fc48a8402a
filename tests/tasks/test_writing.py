"""What models write ends where their positions do."""

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel

from lightning_peft import LoRA, PromptTuning, inject
from lightning_peft.carrying.switching import mixed
from lightning_peft.errors import ConfigError
from lightning_peft.tasks.writing import check_room, written
from tests.tiny_chat import tiny_llama

POSITIONS = 24


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=64, n_positions=POSITIONS, n_embd=16, n_layer=1, n_head=2, bos_token_id=1
    )
    return GPT2LMHeadModel(config).eval()


def bart() -> BartForConditionalGeneration:
    config = BartConfig(
        vocab_size=64, max_position_embeddings=POSITIONS, d_model=16, encoder_layers=1,
        decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2,
        decoder_attention_heads=2, forced_eos_token_id=None,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval()


def asked(tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 60, (2, tokens))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.filterwarnings("ignore:This is a friendly reminder")
@pytest.mark.parametrize("method", [None, LoRA(r=2), PromptTuning(tokens=4)], ids=str)
def test_a_causal_model_writes_until_its_last_position(method: object) -> None:
    model = gpt2()
    virtual = 4 if isinstance(method, PromptTuning) else 0
    if method is not None:
        inject(model, method)
    most = POSITIONS - virtual - 10 + 1  # what is written last is not read
    rows = written(model, asked(10), max_new_tokens=most, end=None, padding=0)
    assert [len(row) for row in rows] == [most, most]
    with pytest.raises(ConfigError, match=rf"at most {most} behind {10 + virtual} tokens"):
        written(model, asked(10), max_new_tokens=most + 1, end=None, padding=0)
    with pytest.raises(ConfigError, match=rf"must cut texts at {POSITIONS - virtual} tokens"):
        written(model, asked(POSITIONS + 1), max_new_tokens=1, end=None, padding=0)


@pytest.mark.filterwarnings("ignore:This is a friendly reminder")
def test_an_encoder_decoder_reads_and_writes_in_places_of_their_own() -> None:
    model = bart()
    given = asked(POSITIONS)
    rows = written(model, given, max_new_tokens=POSITIONS, end=None, padding=0)
    assert [len(row) for row in rows] == [POSITIONS] * 2
    with pytest.raises(ConfigError, match=rf"at most {POSITIONS} behind 1 tokens"):
        written(model, given, max_new_tokens=POSITIONS + 1, end=None, padding=0)
    inject(model, PromptTuning(tokens=4))
    with pytest.raises(ConfigError, match=rf"must cut texts at {POSITIONS - 4} tokens"):
        written(model, given, max_new_tokens=1, end=None, padding=0)


def test_virtual_tokens_of_the_longest_row_count() -> None:
    model = gpt2()
    inject(model, PromptTuning(tokens=2), "short").deactivate()
    inject(model, PromptTuning(tokens=6), "long").deactivate()
    check_room(model, 20, 1)
    with mixed(model, ["short", "short"]):
        check_room(model, 22, 1)
    with (
        mixed(model, ["short", "long"]),
        pytest.raises(ConfigError, match="must cut texts at 18 tokens"),
    ):
        check_room(model, 20, 1)


def test_positions_that_go_on_for_ever_are_no_limit() -> None:
    check_room(tiny_llama(), 2_000, 2_000)
