"""What merging did to the logits, measured on inputs, and what is accepted."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.errors import AdapterError
from lightning_peft.merging.quantised import is_quantised
from lightning_peft.structure.anatomy import is_transformers
from lightning_peft.structure.probe import run

TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2}
"""The largest relative difference that is accepted, by the least precise dtype in the model."""

QUANTISED = 5e-2
"""The largest relative difference that is accepted where weights are quantised."""

TEXTS = (
    "The committee will publish its decision on Thursday, after hearing both sides.",
    "Best coffee I have had in years!",
    "In 1969, two people walked on the Moon; in 2024 nobody did.",
    "Broken on arrival, and nobody answers the phone.",
)
"""What is read where no inputs are given, but a tokenizer."""

Batch = Mapping[str, Any]
Inputs = Batch | Sequence[Batch]


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What merging an adapter did to the logits."""

    adapter: str
    """The adapter's name."""

    methods: list[dict[str, Any]]
    """Its methods with their settings."""

    scale: float
    """How much of its change was applied."""

    dtype: str
    """The least precise dtype of the model's weights, or `quantised`."""

    rows: int
    """How many rows of inputs were compared."""

    absolute: float
    """The largest difference of a logit."""

    relative: float
    """The norm of the difference of all logits, relative to that of the unmerged ones."""

    tolerance: float
    """What `relative` must not exceed."""

    effect: float
    """How much the adapter's deltas changed the logits, measured as `relative` is."""

    weights: list[str]
    """The modules whose weights were changed."""

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.relative <= self.tolerance

    @property
    def lost(self) -> float:
        """The difference relative to what the adapter does: from 1 on, nothing of it is left."""
        return self.relative / self.effect if self.effect else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return it in plain containers, as `merge.json` holds it."""
        return {**asdict(self), "passed": self.passed, "lost": self.lost}


def compare(before: Sequence[Tensor], after: Sequence[Tensor]) -> tuple[float, float]:
    """Return the largest absolute difference of logits, and the relative one, of their norms.

    What is infinite in both alike (a masked logit) does not count; what became so does.
    """
    largest = gap_square = size_square = 0.0
    for old, new in zip(before, after, strict=True):
        finite = ~((old == new) & old.isinf())
        size, gap = old[finite].double(), (new.double() - old.double())[finite]
        if not gap.isfinite().all():
            return float("inf"), float("inf")
        largest = max(largest, gap.abs().max().item() if len(gap) else 0.0)
        gap_square += gap.square().sum().item()
        size_square += size.square().sum().item()
    if not size_square:
        return largest, float("inf") if gap_square else 0.0
    return largest, math.sqrt(gap_square / size_square)


def precision(model: nn.Module) -> tuple[str, float]:
    """Return the least precise dtype in a model, or `quantised`, and its tolerance."""
    weights = list(model.parameters())
    if any(is_quantised(weight) for weight in weights):
        return "quantised", QUANTISED
    present = {str(weight.dtype).removeprefix("torch.") for weight in weights}
    name = max(present & TOLERANCES.keys(), key=TOLERANCES.__getitem__, default="float32")
    return name, TOLERANCES[name]


def batches_of(model: nn.Module, inputs: Inputs | None, tokenizer: Any) -> list[Batch]:
    """Return the batches to compare on, on the model's device; none stands for a few tokens.

    Raises:
        AdapterError: the model needs `inputs`.
    """
    if inputs is None and tokenizer is not None:
        inputs = tokenizer(list(TEXTS), padding=True, truncation=True, return_tensors="pt")
    if inputs is None and is_transformers(model):
        return []
    if inputs is None:
        raise AdapterError(
            f"`inputs` must be a batch that {type(model).__name__} takes, by the names of its "
            "arguments, but is None."
        )
    batches = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    device = next(model.parameters()).device
    return [{k: _moved(v, device) for k, v in batch.items()} for batch in batches]


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def cast_to(batch: Batch, dtype: torch.dtype) -> Batch:
    """Return a batch with its floating-point tensors in another dtype."""
    floating = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return {**batch, **{name: tensor.to(dtype) for name, tensor in floating.items()}}


def count_rows(batch: Batch) -> int:
    """Return how many rows a batch has."""
    return next((len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim()), 1)


def logits_of(model: nn.Module, batches: Sequence[Batch]) -> list[Tensor]:
    """Return the logits of each batch, or what else the model returns first, flat.

    Raises:
        AdapterError: it returns no tensor of numbers.
    """
    if not batches:
        torch.manual_seed(0)  # a probe of images is noise, and must be the same each time
        return [_chosen_from(run(model))]
    return [_chosen_from(model(**batch)) for batch in batches]


def _chosen_from(output: Any) -> Tensor:
    named = output.items() if isinstance(output, Mapping) else enumerate(_as_list(output))
    tensors = {k: v for k, v in named if isinstance(v, Tensor) and v.is_floating_point()}
    chosen = [v for k, v in tensors.items() if "logits" in str(k)] or [
        v for v in tensors.values() if v.dim()
    ][:1]
    if not chosen:
        raise AdapterError("The model must return a tensor of numbers to compare, but does not.")
    return torch.cat([tensor.flatten() for tensor in chosen])


def _as_list(output: Any) -> Sequence[Any]:
    return output if isinstance(output, tuple | list) else [output]
