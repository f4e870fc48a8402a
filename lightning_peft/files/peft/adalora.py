"""AdaLoRA. peft leaves out the ranks that were taken away; here they come back as zeros.

Our schedule is in shares of all steps, peft's in steps: it is written for a run of 1000.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.errors import AdapterError
from lightning_peft.files.peft import names, on_weights
from lightning_peft.files.peft.settings import Settings
from lightning_peft.files.peft.spelling import BASE, Entry, Part, Spelling
from lightning_peft.method import Method
from lightning_peft.methods.adalora import AdaLoRA

_STEPS = 1000


class AdaLoRASpelling(Spelling):
    """Products of three."""

    peft_type = "ADALORA"
    kinds = ("adalora",)

    def config(self, part: Part) -> dict[str, Any]:
        """Return the settings of the method as peft spells them."""
        on_weights.require_hosts(part, on_weights.LINEAR_AND_CONV1D)
        method = cast(AdaLoRA, part.method)
        begin, end = method.phases(_STEPS)
        return {
            "beta1": method.beta1,
            "beta2": method.beta2,
            "bias": "none",
            "deltaT": method.every,
            "fan_in_fan_out": on_weights.turned(part),
            "init_lora_weights": True,
            "init_r": method.init_r,
            "lora_alpha": method.alpha,
            "lora_dropout": method.dropout,
            "orth_reg_weight": method.orthogonality,
            "rank_pattern": None,
            "target_modules": on_weights.hosts_config(part)["target_modules"],
            "target_r": method.r,
            "tfinal": _STEPS - end,
            "tinit": begin,
            "total_step": _STEPS,
        }

    def method(self, settings: Settings, keys: Sequence[str], model: nn.Module) -> Method:
        """Return AdaLoRA with the settings."""
        settings.ignore("r", "rank_pattern", "init_lora_weights", "loftq_config", "use_rslora")
        settings.ignore("qalora_group_size", "fan_in_fan_out")
        if settings.take("bias", "none") != "none":
            raise settings.refusal("bias", "must be none for this method")
        steps = settings.take("total_step", 0) or _STEPS
        init = settings.take("init_r", 12)
        return AdaLoRA(
            r=min(settings.take("target_r", 8), init),
            init_r=init,
            alpha=settings.take("lora_alpha", 8.0),
            dropout=settings.take("lora_dropout", 0.0),
            warmup=settings.take("tinit", 0) / steps,
            final=settings.take("tfinal", 0) / steps,
            every=settings.take("deltaT", 1),
            beta1=settings.take("beta1", 0.85),
            beta2=settings.take("beta2", 0.85),
            orthogonality=settings.take("orth_reg_weight", 0.5),
            targets=names.as_targets(model, names.target_hosts(settings, model)),
        )

    def entries(self, part: Part) -> list[Entry]:
        """Return the three factors of each host."""
        kept: dict[str, int] = {}
        return [
            Entry(key, ours, _value(ours), _padded(key, host, kept, tensor, name == "lora_B"))
            for host, name, ours, tensor in on_weights.own_tensors(part)
            for key in [f"{BASE}{host}.{name}"]
        ]


def _value(ours: str) -> Callable[..., Tensor]:
    return lambda state: state[ours]


def _padded(
    key: str, host: str, kept: dict[str, int], own: Tensor, columns: bool
) -> Callable[[Tensor], Tensor]:
    """Return what reads a factor with as many ranks as were kept, and puts zeros for the rest."""

    def read(tensor: Tensor) -> Tensor:
        given, whole = (tensor.mT, own.mT) if columns else (tensor, own)
        fits = given.dim() == 2 and len(given) <= len(whole) and given.shape[1] == whole.shape[1]
        if not fits or kept.setdefault(host, len(given)) != len(given):
            raise AdapterError(
                f"`{key}` must have shape {tuple(own.shape)}, or less of the rank as its siblings, "
                f"but has {tuple(tensor.shape)} instead."
            )
        padded = F.pad(given, (0, 0, 0, len(whole) - len(given)))
        return padded.mT if columns else padded

    return read


SPELLING = AdaLoRASpelling()
