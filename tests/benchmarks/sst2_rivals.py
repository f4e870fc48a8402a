"""The methods of `sst2.py` as peft and adapters have them, with the sizes and places of ours.

peft 0.21 has no bottleneck adapters and no ReFT, adapters 1.3 does. peft's LoftQ needs CUDA, and so
does the second factor of its BOFT, which has one here; full fine-tuning, Freeze and BitFit are a
plain loop in both, so that there is nothing to compare.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

Batch = dict[str, Tensor]

_ALL: dict[str, Any] = {"target_modules": ["query", "key", "value", "dense"]}
_STACK: dict[str, Any] = {"exclude_modules": r".*pooler.*"} | _ALL
_MATCHED: dict[str, Any] = {"target_modules": r".*encoder.*\.(query|key|value|dense)"}
"""The same places, for configurations that exclude nothing."""
_LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16} | _STACK
_PRODUCT: dict[str, Any] = {"r": 8, "alpha": 8} | _STACK
_ADALORA: dict[str, Any] = {"init_r": 12, "target_r": 8, "lora_alpha": 16, "deltaT": 10}
PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", _LORA),
    "dora": ("LoraConfig", _LORA | {"use_dora": True}),
    "lora_plus": ("LoraConfig", _LORA),
    "pissa": ("LoraConfig", _LORA | {"lora_alpha": 8, "init_lora_weights": "pissa_niter_16"}),
    "olora": ("LoraConfig", _LORA | {"lora_alpha": 8, "init_lora_weights": "olora"}),
    "eva": ("LoraConfig", _LORA | {"init_lora_weights": "eva"}),
    "adalora": ("AdaLoraConfig", _ADALORA | {"orth_reg_weight": 0.1} | _STACK),
    "vera": ("VeraConfig", {"r": 256} | _MATCHED),
    "loha": ("LoHaConfig", _PRODUCT),
    "lokr": ("LoKrConfig", _PRODUCT),
    "hira": ("HiraConfig", {"r": 32} | _STACK),
    "shira": ("ShiraConfig", {"r": 32} | _MATCHED),
    "miss": ("MissConfig", {"r": 64} | _STACK),
    "oft": ("OFTConfig", {"oft_block_size": 32} | _STACK),
    "boft": ("BOFTConfig", {"boft_block_size": 8} | _STACK),
    "fourierft": ("FourierFTConfig", {"n_frequency": 1000, "scaling": 150.0} | _STACK),
    "c3a": ("C3AConfig", {"block_size": 192} | _MATCHED),
    "ia3": (
        "IA3Config",
        {
            "target_modules": ["key", "value", "output.dense"],
            "feedforward_modules": ["output.dense"],
        },
    ),
    "ln_tuning": ("LNTuningConfig", {"target_modules": ["LayerNorm"]}),
    "trainable_tokens": ("TrainableTokensConfig", {"target_modules": ["word_embeddings"]}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 20}),
    "p_tuning_v2": ("PrefixTuningConfig", {"num_virtual_tokens": 20}),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 20}),
    "p_tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 20, "encoder_hidden_size": 384}),
}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bottleneck": ("SeqBnConfig", {"reduction_factor": 16}),
    "loreft": (
        "LoReftConfig",
        {"r": 4, "prefix_positions": 128, "tied_weights": True, "dropout": 0.0},
    ),
    "mam": ("MAMConfig", {}),
    "unipelt": ("UniPELTConfig", {}),
}


def _nothing(*_: Any) -> None: ...


@dataclass(kw_only=True)
class Contender:
    """What the loop of `sst2_run.py` must know of who trains."""

    model: nn.Module
    save: Callable[[Path], object]
    groups: list[dict[str, Any]]
    start: Callable[[list[Batch]], object] = field(default=_nothing)
    """Called before the first step with batches, for a method that starts from data."""
    before_step: Callable[[int, int], object] = field(default=_nothing)
    """Called with the step and how many there are, once the gradients are complete."""
    after_step: Callable[[Optimizer, int, int], object] = field(default=_nothing)
    """Called after the optimizer's step, while the gradients are still there."""


def rival_of(method: str) -> str | None:
    """Return who beside us has a method, or None."""
    return "peft" if method in PEFT else "adapters" if method in ADAPTERS else None


def by_peft(
    model: nn.Module, method: str, steps: int, rates: Callable[[nn.Module, float], Any]
) -> Contender:
    """Return what peft makes of a model; `rates` groups its parameters, B of LoRA+ apart."""
    import peft

    name, settings = PEFT[method]
    if method == "adalora":  # the ranks fall between a tenth and half of the steps
        settings = settings | {"total_step": steps, "tinit": steps // 10, "tfinal": steps // 2}
    if method == "eva":
        settings = settings | {"eva_config": peft.EvaConfig(rho=1.0)}
    if method == "trainable_tokens":
        vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator,union-attr]
        settings = settings | {"token_indices": list(range(vocabulary))}
    tuned: Any = peft.get_peft_model(model, getattr(peft, name)(task_type="SEQ_CLS", **settings))
    contender = Contender(
        model=tuned,
        save=tuned.save_pretrained,
        groups=rates(tuned, 16.0 if method == "lora_plus" else 1.0),
    )
    if method == "adalora":
        contender.after_step = lambda _, step, __: tuned.base_model.update_and_allocate(step)
    if method == "eva":
        contender.start = lambda batches: _eva(tuned, batches)
    return contender


def _eva(tuned: Any, batches: Iterable[Batch]) -> None:
    from peft import initialize_lora_eva_weights

    initialize_lora_eva_weights(tuned, dataloader=list(batches), show_progress_bar=False)


def by_adapters(
    model: Any, method: str, steps: int, rates: Callable[[nn.Module, float], Any]
) -> Contender:
    """Return what adapters makes of a model."""
    import adapters

    name, settings = ADAPTERS[method]
    adapters.init(model)
    model.add_adapter("sst2", config=getattr(adapters, name)(**settings))
    model.train_adapter("sst2")
    return Contender(
        model=model,
        save=lambda folder: model.save_adapter(str(folder), "sst2"),
        groups=rates(model, 1.0),
    )
