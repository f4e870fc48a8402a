"""Whether conversations may share a row: whether each is read as if it stood there alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_peft.delta import SLOT
from lightning_peft.errors import AdapterError, ConfigError

_LENGTHS = (5, 9, 6)  # tokens of the conversations that are tried
_TOLERANCE = 1e-3  # of the largest logit
_TOLERANCE_HALF = 0.03


@torch.no_grad()
def check_packing(model: nn.Module, vocabulary: int) -> None:
    """Compare what the model computes for conversations in one row and in rows of their own.

    Adapters start as the identity, so their parameters are disturbed while this is tried.

    Args:
        model: Takes `input_ids` and `position_ids`, and returns an object with `logits`.
        vocabulary: How many tokens it knows.

    Raises:
        ConfigError: They differ.
    """
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(vocabulary, (1, n), generator=generator) for n in _LENGTHS]
    with _disturbed(model):
        try:
            apart = torch.cat([_logits(model, [row]) for row in rows], 1)
            together = _logits(model, rows)
        except (AdapterError, TypeError) as error:  # of a forward that takes no such argument
            raise ConfigError(f"{_refusal(model)}: {error}") from error
    change = float((apart - together).abs().max() / apart.abs().max())
    half = next(model.parameters()).dtype in (torch.float16, torch.bfloat16)
    if not change <= (_TOLERANCE_HALF if half else _TOLERANCE):
        raise ConfigError(
            f"{_refusal(model)}: its logits for a conversation change by {change:.1%} when others "
            "share the row. Virtual tokens stand before the first conversation alone, and some "
            "attention does not part them; `data.by_length=true` leaves little padding, too."
        )


def _refusal(model: nn.Module) -> str:
    return f"`data.pack` must be false for {type(model).__name__} with these methods"


def _logits(model: nn.Module, rows: list[Tensor]) -> Tensor:
    device = next(model.parameters()).device
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows]).unsqueeze(0)
    ids = torch.cat(rows, 1)
    output = model(input_ids=ids.to(device), position_ids=positions.to(device), use_cache=False)
    return output.logits.float()


@contextmanager
def _disturbed(model: nn.Module) -> Iterator[None]:
    """Let adapters change what the model computes, and put everything back."""
    modes = {module: module.training for module in model.modules()}
    added = [p for name, p in model.named_parameters() if SLOT in name.split(".")]
    before = [parameter.clone() for parameter in added]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.eval()
        for parameter in added:
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        try:
            yield
        finally:
            for parameter, values in zip(added, before, strict=True):
                parameter.copy_(values)
            for module, mode in modes.items():
                module.training = mode
