"""A model in GGUF: unpacked once, with the weights and the tokens that were packed."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from lightning_peft import gguf as ours
from lightning_peft.errors import ConfigError
from lightning_peft.models import ModelSource
from tests.tiny_chat import CHATML, tiny_llama, tiny_tokenizer

NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def packed_name(name: str) -> str:
    """What llama.cpp calls a parameter."""
    whole = {"embed_tokens": "token_embd", "lm_head": "output", "norm": "output_norm"}
    parts = name.removeprefix("model.").split(".")
    if parts[0] == "layers":
        return f"blk.{parts[1]}.{NAMES['.'.join(parts[2:-1])]}.weight"
    return f"{whole[parts[0]]}.weight"


def paired(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Order rows as llama.cpp does, which rotates neighbours instead of halves."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model, tokenizer) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install '.[gguf]'")
    writer, config = gguf.GGUFWriter(str(path), "llama"), model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    words += [f"[{i}]" for i in range(len(words), config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3] * 3 + [1] * (len(words) - 3))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(CHATML)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        kind = name.split(".")[-2]
        packed = paired(weight, heads[kind]) if kind in heads else weight
        writer.add_tensor(packed_name(name), packed.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def packed(tmp_path, monkeypatch):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return ModelSource(name=str(tmp_path), gguf_file="tiny.gguf"), model, tokenizer


def test_what_was_packed_comes_out_and_can_be_saved(packed, tmp_path, capfd):
    source, model, tokenizer = packed
    found = source.load("AutoModelForCausalLM")
    ids = torch.arange(3, 40).unsqueeze(0)
    torch.testing.assert_close(found(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    again = source.tokenizer()
    text = "<|im_start|>user\nhello how are you<|im_end|>"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.chat_template == CHATML
    assert again.model_max_length == 1024
    found.save_pretrained(tmp_path / "plain")
    assert ModelSource(name=str(tmp_path / "plain")).load("AutoModelForCausalLM") is not None
    assert "GGUF" not in capfd.readouterr().err


def test_it_is_unpacked_once(packed, monkeypatch):
    source, *_ = packed
    folder = source.path()
    monkeypatch.setattr(ours, "_unpack", lambda *args: pytest.fail("unpacked again"))
    assert source.path() == folder


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"`gguf_file` must be a file in .* 'none.gguf' instead"):
        ModelSource(name=str(tmp_path), gguf_file="none.gguf").path()
