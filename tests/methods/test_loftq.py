"""LoftQ: the start is what rounding loses, and the rounding is that of the field's library."""

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import inject
from lightning_peft.delta import SLOT
from lightning_peft.errors import ConfigError
from lightning_peft.methods import LoftQ
from lightning_peft.ops.rounding import rounded_to_int8, rounded_to_nf4

ROUNDINGS = {4: rounded_to_nf4, 8: rounded_to_int8}


def weight() -> Tensor:
    return torch.randn(48, 72, generator=torch.Generator().manual_seed(0))


def start_of(bits: int, iterations: int, r: int = 4) -> Tensor:
    """Return s · B₀ A₀ of one layer with `weight()`."""
    layer = nn.Sequential(nn.Linear(72, 48))
    layer[0].weight.data = weight()
    method = LoftQ(r=r, alpha=2 * r, bits=bits, iterations=iterations, niter=0, targets="0")  # type: ignore[arg-type]
    inject(layer, method, head=False)
    a, b = (layer.state_dict()[f"0.{SLOT}.default_loftq.start_{m}"] for m in "ab")
    return 2 * b @ a


@pytest.mark.parametrize("bits", ROUNDINGS)
def test_one_iteration_starts_from_the_largest_directions_of_the_error(bits: int) -> None:
    u, s, vh = torch.linalg.svd(weight() - ROUNDINGS[bits](weight()), full_matrices=False)
    expected = u[:, :4] * s[:4] @ vh[:4]
    torch.testing.assert_close(start_of(bits, iterations=1), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bits", ROUNDINGS)
def test_the_rounded_weight_and_the_start_come_closer_to_the_weight(bits: int) -> None:
    rounded = ROUNDINGS[bits]

    def error(start: Tensor) -> float:
        return float((weight() - rounded(weight() - start) - start).norm())

    alone, once, often = error(torch.zeros(1)), error(start_of(bits, 1)), error(start_of(bits, 5))
    assert often < once < alone


def test_nf4_gives_the_values_that_bitsandbytes_gives() -> None:
    row = torch.tensor([0.02, -1.0, 0.4, 0.5, -0.3, 0.07, 2.0, -0.9]).repeat(8)  # one block
    # bitsandbytes 0.50.2: dequantize_4bit(*quantize_4bit(row, blocksize=64, quant_type="nf4"))
    values = [0.0, -1.0501461, 0.3218603, 0.4922246, -0.3695469, 0.0, 2.0, -0.7898350]
    torch.testing.assert_close(rounded_to_nf4(row)[:8], torch.tensor(values))


@pytest.mark.parametrize("bits", ROUNDINGS)
def test_zeros_and_largest_values_are_rounded_to_themselves(bits: int) -> None:
    rounded = ROUNDINGS[bits]
    assert torch.equal(rounded(torch.zeros(3, 5)), torch.zeros(3, 5))
    assert rounded(torch.tensor([[0.3, 0.0], [1.0, -7.0]]))[1, 1] == -7.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, "`bits` must be 4 or 8, but is 3 instead"),
        ({"iterations": 0}, "`iterations` must be at least 1, but is 0 instead"),
        ({"niter": -1}, "`niter` must be 0 or more, but is -1 instead"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoftQ(**settings)  # type: ignore[arg-type]
