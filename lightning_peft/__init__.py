"""Parameter-efficient fine-tuning for PyTorch Lightning.

The public names are imported when they are first used, so `import lightning_peft` stays cheap.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_peft.adapter import Adapter
    from lightning_peft.callback import PEFT
    from lightning_peft.carrying.switching import mixed, switch
    from lightning_peft.files.adapter_folder import load_adapter
    from lightning_peft.files.last_checkpoint import last_checkpoint
    from lightning_peft.method import inject
    from lightning_peft.methods.bottleneck import BottleneckAdapter
    from lightning_peft.methods.freeze import Freeze
    from lightning_peft.methods.lora import LoRA
    from lightning_peft.methods.p_tuning import PTuning
    from lightning_peft.methods.prefix_tuning import PrefixTuning
    from lightning_peft.methods.prompt_tuning import PromptTuning
    from lightning_peft.module import PEFTModule
    from lightning_peft.structure.targets import Targets

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "adapter",
    "BottleneckAdapter": "methods.bottleneck",
    "Freeze": "methods.freeze",
    "LoRA": "methods.lora",
    "PEFT": "callback",
    "PEFTModule": "module",
    "PTuning": "methods.p_tuning",
    "PrefixTuning": "methods.prefix_tuning",
    "PromptTuning": "methods.prompt_tuning",
    "Targets": "structure.targets",
    "inject": "method",
    "last_checkpoint": "files.last_checkpoint",
    "load_adapter": "files.adapter_folder",
    "mixed": "carrying.switching",
    "switch": "carrying.switching",
}

__all__ = [
    "PEFT",
    "Adapter",
    "BottleneckAdapter",
    "Freeze",
    "LoRA",
    "PEFTModule",
    "PTuning",
    "PrefixTuning",
    "PromptTuning",
    "Targets",
    "inject",
    "last_checkpoint",
    "load_adapter",
    "mixed",
    "switch",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
