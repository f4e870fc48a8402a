"""What is left of a weight when it is kept in few bits: rounded, and unpacked again."""

import torch
from torch import Tensor

# Quantiles of a normal distribution, zero and both ends among them (Dettmers et al. 2023, app. E).
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_BLOCK = 64


def rounded_to_nf4(matrix: Tensor) -> Tensor:
    """Return a weight as it comes out of NF4 (QLoRA, https://arxiv.org/abs/2305.14314).

    Each block of 64 entries, counted along the rows, is divided by its largest magnitude, and each
    entry goes to the nearest of 16 values. The magnitudes themselves are kept as they are.
    """
    missing = -matrix.numel() % _BLOCK
    blocks = torch.nn.functional.pad(matrix.reshape(-1), (0, missing)).view(-1, _BLOCK)
    largest = blocks.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)
    values = matrix.new_tensor(_NF4)
    borders = (values[1:] + values[:-1]) / 2
    rounded = values[torch.bucketize(blocks / largest, borders)] * largest
    return rounded.view(-1)[: matrix.numel()].view(matrix.shape)


def rounded_to_int8(matrix: Tensor) -> Tensor:
    """Return a weight as it comes out of LLM.int8 (https://arxiv.org/abs/2208.07339).

    Each row is divided by its largest magnitude, and each entry goes to the nearest of 255 steps.
    """
    step = matrix.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny) / 127
    return (matrix / step).round() * step
