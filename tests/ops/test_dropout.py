"""Dropout fused with the small product behind it."""

import pytest
import torch
from torch import Tensor

from lightning_peft.ops.dropout import _mask, dropped_linear


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("trains_input", [True, False])
def test_gradients_are_those_of_the_two_operations(trains_input: bool) -> None:
    x, a, g = (
        noise(2, 5, 7).requires_grad_(trains_input),
        noise(3, 7).requires_grad_(),
        noise(2, 5, 3),
    )
    torch.manual_seed(1)
    dropped_linear(x, a, 0.4).backward(g)
    ours = (x.grad, a.grad)
    x.grad = a.grad = None
    torch.manual_seed(1)
    mask, scale = _mask(x, 0.4)
    ((x * mask * scale) @ a.T).backward(g)
    assert 0 < mask.sum() < mask.numel()
    for own, expected in zip(ours, (x.grad, a.grad), strict=True):
        assert (own is None) == (expected is None)
        if own is not None and expected is not None:
            torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.99999])
def test_drops_as_many_as_asked_and_makes_up_for_them(p: float) -> None:
    torch.manual_seed(0)
    mask, scale = _mask(torch.empty(1001, 999), p)
    assert mask.shape == (1001, 999)
    assert abs((~mask).float().mean() - p) < 1e-3
    assert scale == pytest.approx(1 / (1 - p), rel=1e-3 if p < 0.9 else 0.6)


def test_neighbours_and_rounds_are_independent() -> None:
    torch.manual_seed(0)
    first, second = (_mask(torch.empty(4, 250_000), 0.5)[0].float() for _ in range(2))
    rows = torch.stack([*first, second[0]])
    correlation = torch.corrcoef(torch.cat([rows, rows.roll(1, 1)]))
    assert (correlation - torch.eye(len(correlation))).abs().max() < 0.01


def test_under_autocast_gradients_keep_the_parameters_dtype() -> None:
    x, a = torch.randn(4, 8, requires_grad=True), torch.randn(2, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = dropped_linear(x, a, 0.1)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    gradients = [tensor.grad for tensor in (x, a) if tensor.grad is not None]
    assert [gradient.dtype for gradient in gradients] == [torch.float32] * 2
