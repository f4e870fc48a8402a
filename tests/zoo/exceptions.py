"""What the names of settings do not tell: settings of single models, and models that cannot run."""

from typing import Any

SETTINGS: dict[str, dict[str, Any]] = {
    "BambaConfig": {"attn_layer_indices": [1]},
    "GPTJConfig": {"rotary_dim": 4},
    "CodeGenConfig": {"rotary_dim": 4},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "MptConfig": {"expansion_ratio": 2},
}
"""By configuration class, settings that must fit together."""

UNAVAILABLE: dict[str, str] = {
    "DinatForImageClassification": "needs natten",
    "Gemma3nForConditionalGeneration": "its vision tower needs timm",
    "LayoutLMv2ForQuestionAnswering": "needs detectron2",
    "LayoutLMv2ForSequenceClassification": "needs detectron2",
    "LayoutLMv2ForTokenClassification": "needs detectron2",
    "TimmWrapperForImageClassification": "needs timm",
}
"""By model class, why it cannot be built here."""
