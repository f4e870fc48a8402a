"""What the names of settings do not tell: settings of single models, and models that cannot run."""

from typing import Any

_SWIN: dict[str, Any] = {"depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
_GEMMA4 = {"global_head_dim": 8, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
           "moe_intermediate_size": 48}  # fmt: skip

SETTINGS: dict[str, dict[str, Any]] = {
    "BambaConfig": {"attn_layer_indices": [1]},
    "BltConfig": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_config": {"hidden_size_global": 32},
        "decoder_config": {"hidden_size_global": 32},
        "use_cache": False,
    },
    "BrosConfig": {"hidden_size": 64},
    "CodeGenConfig": {"rotary_dim": 4},
    "CohereCompassTextConfig": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "CvtConfig": {"depth": [1, 2, 3]},
    "DbrxConfig": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "DonutSwinConfig": _SWIN,
    "Dots3NoteTextConfig": {
        "head_dim": 16,
        "swa_head_dim": 16,
        "swa_kv_lora_rank": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
        "index_head_dim": 8,
        "index_n_heads": 4,
    },
    "EfficientNetConfig": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320},
    "EncoderDecoderConfig": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "GPTJConfig": {"rotary_dim": 4},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "Gemma4TextConfig": _GEMMA4,
    "Gemma4UnifiedTextConfig": {"global_head_dim": 8},
    "GraniteMoeHybridConfig": {"layer_types": ["linear_attention", "full_attention"]},
    "HGNetV2Config": {
        "embedding_size": 16,
        "stem_channels": [3, 8, 16],
        "stage_in_channels": [16, 32, 32, 32],
        "stage_mid_channels": [16, 16, 16, 16],
        "stage_out_channels": [32, 32, 32, 32],
        "hidden_sizes": [32, 32, 32, 32],
        "stage_num_blocks": [1, 1, 1, 1],
        "stage_numb_of_layers": [2, 2, 2, 2],
    },
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "LayoutLMv3Config": {"coordinate_size": 6, "shape_size": 4, "input_size": 32},
    "LevitConfig": {"image_size": 128, "patch_size": 16},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "LiltConfig": {"hidden_size": 48},
    "Mamba2Config": {"num_heads": 8},
    "LongcatFlashConfig": {"zero_expert_num": 1},
    "MobileViTConfig": {"image_size": 64, "neck_hidden_sizes": [16, 32, 32, 48, 48, 48, 48]},
    "MobileViTV2Config": {"image_size": 64, "width_multiplier": 0.5},
    "MptConfig": {"expansion_ratio": 2},
    "MusicgenDecoderConfig": {"num_codebooks": 1},
    "MusicgenMelodyDecoderConfig": {"num_codebooks": 1},
    "PvtConfig": {"image_size": 64},  # with less, its attention meets one key
    "PerceiverConfig": {
        "num_latents": 8,
        "num_blocks": 1,
        "d_latents": 32,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 1,
    },
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "RecurrentGemmaConfig": {"block_types": ["recurrent", "attention"]},
    "ReformerConfig": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds": False,
        "attention_head_size": 8,
        "feed_forward_size": 48,
        "hash_seed": 0,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
    },
    "SwinConfig": _SWIN,
    "Swinv2Config": _SWIN,
    "ShieldGemma2Config": {"yes_token_index": 50, "no_token_index": 51},
    "Siglip2VisionConfig": {"num_patches": 16},
    "TextNetConfig": {"stem_out_channels": 16},
    "VibeVoiceAsrConfig": {"acoustic_tokenizer_chunk_size": 1440000},
    "XmodConfig": {"default_language": "en_XX"},
    "ZambaConfig": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
    },
    "ZayaConfig": {"num_experts_per_tok": 1},
    "xLSTMConfig": {
        "hidden_size": 64,
        "qk_dim_factor": 1.0,
        "mode": "train",
        "chunk_size": 4,
        "use_cache": False,
    },
}
"""By configuration class, settings that must fit together; a dictionary is for one inside."""

UNAVAILABLE: dict[str, str] = {
    "DinatForImageClassification": "needs natten",
    "Gemma3nForConditionalGeneration": "its vision tower needs timm",
    "Gemma4AssistantForCausalLM": "reads the hidden states and the keys of another model",
    "Gemma4UnifiedAssistantForCausalLM": "reads the hidden states and the keys of another model",
    "LayoutLMv2ForQuestionAnswering": "needs detectron2",
    "LayoutLMv2ForSequenceClassification": "needs detectron2",
    "LayoutLMv2ForTokenClassification": "needs detectron2",
    "TimmWrapperForImageClassification": "needs timm",
}
"""By model class, why it cannot be built here."""
