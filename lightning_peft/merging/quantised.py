"""Weights that are kept in few bits, unpacked so that a change can be written into them.

Known are those that round each weight to the nearest value of a grid which follows from the weights
themselves: bitsandbytes' 8-bit rows (LLM.int8, Dettmers et al. 2022,
https://arxiv.org/abs/2208.07339) and 4-bit blocks (NF4, FP4; QLoRA, Dettmers et al. 2023,
https://arxiv.org/abs/2305.14314), and torchao's 8-bit rows. Packed again, the changed weights get a
grid of their own. Formats that were fitted to data (GPTQ, AWQ) have no such way back.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.delta import NotMergeable

Packing = tuple[Callable[[Any, Any], Tensor], Callable[[Any, Any, Tensor], Tensor]]
"""How a host's parameter is unpacked, and what a matrix becomes that takes its place."""


def is_quantised(parameter: Tensor) -> bool:
    """Whether a parameter holds something else than its values one by one."""
    return type(parameter.data) is not Tensor or not parameter.is_floating_point()


@contextmanager
def opened(module: nn.Module) -> Iterator[None]:
    """Within this context a module's quantised weights are plain, and are packed again at its end.

    Raises:
        NotMergeable: one is quantised in a way that has no way back.
    """
    packed = {n: p for n, p in module._parameters.items() if p is not None and is_quantised(p)}
    ways = {name: _way(module, name, parameter) for name, parameter in packed.items()}
    for name, (unpack, _) in ways.items():
        plain = unpack(module, packed[name]).float()
        module._parameters[name] = nn.Parameter(plain, requires_grad=False)
    changed: dict[str, Any] = {}
    try:
        yield
        for name, (_, pack) in ways.items():
            changed[name] = pack(module, packed[name], module._parameters[name].data)  # type: ignore[union-attr]
    finally:
        module._parameters.update(packed | changed)


def way_back(module: Any) -> Callable[[], None]:
    """Return a function that gives a module its present parameters and buffers again, bitwise."""
    slots = [module._parameters, module._buffers]
    present = [dict(slot) for slot in slots]
    tensors = [tensor for slot in present for tensor in slot.values() if tensor is not None]
    data = [(tensor, tensor.data) for tensor in tensors]
    # What says how a tensor is quantised lies beside it; forward passes move and change it.
    kept = [(holder, dict(holder)) for tensor in tensors for holder in _beside(module, tensor)]

    def restore() -> None:
        for slot, content in zip(slots, present, strict=True):
            slot.update(content)
        for tensor, values in data:
            tensor.data = values
        for holder, content in kept:
            holder.update(content)

    return restore


def _beside(module: Any, tensor: Tensor) -> list[dict[str, Any]]:
    if not is_quantised(tensor):
        return []
    states = [tensor.__dict__.get("quant_state"), getattr(module, "state", None)]
    return [tensor.__dict__, *(state.__dict__ for state in states if state is not None)]


def _way(module: nn.Module, name: str, parameter: Tensor) -> Packing:
    kind = type(parameter).__name__
    if kind not in _WAYS:
        raise NotMergeable(
            f"The {name} of {type(module).__name__} is a {kind} of {parameter.dtype}, which cannot "
            "be written into: load the base without quantisation, or call its `dequantize()` "
            "first, and merge there."
        )
    return _WAYS[kind]


def _rows(module: Any, weight: Any) -> Tensor:
    # After the first forward pass they lie in the module's state.
    codes, scales = (
        getattr(weight, name) if getattr(weight, name) is not None else getattr(module.state, name)
        for name in ("CB", "SCB")
    )
    return codes.float() * (scales.float() / 127).unsqueeze(-1)


def _into_rows(module: Any, weight: Any, matrix: Tensor) -> Tensor:
    # Not through its own rounding, which goes by way of float16.
    scales = matrix.abs().amax(-1)
    codes = (matrix * (127 / scales.clamp_min(1e-30)).unsqueeze(-1)).round().to(weight.dtype)
    return type(weight)(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)


def _blocks(module: Any, weight: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        raise NotMergeable(
            "bitsandbytes has rearranged the 4-bit weights for this CPU, with no exact way back: "
            "merge on a GPU, or load the base without quantisation."
        )
    return dequantize_4bit(weight.data, weight.quant_state)


def _into_blocks(module: Any, weight: Any, matrix: Tensor) -> Tensor:
    settings = ("blocksize", "compress_statistics", "quant_type", "quant_storage", "module")
    same = {name: getattr(weight, name) for name in settings}
    new = type(weight)(matrix.cpu().to(weight.quant_state.dtype), requires_grad=False, **same)
    return new.to(weight.device)


def _torchao(module: Any, weight: Any) -> Tensor:
    return weight.dequantize()


def _into_torchao(module: Any, weight: Any, matrix: Tensor) -> Tensor:
    from torchao.quantization import PerRow

    if weight.block_size[-1] != weight.shape[-1] or weight.act_pre_scale is not None:
        raise NotMergeable(
            "The weight is a torchao tensor with several scales a row, which is not known how to "
            "make again: load the base without quantisation."
        )
    # A row that stays within its grid keeps it: torchao's own choice would shift every code.
    top = 63.5 if weight.reduce_range else 127.5
    low, high = matrix.aminmax(dim=-1, keepdim=True)
    needed = torch.maximum(-low / (top + 1), high / top).to(weight.scale.dtype)
    new = type(weight.data).from_hp(
        matrix.to(weight.dtype),
        PerRow(),
        scale=torch.maximum(weight.scale, needed),
        act_quant_kwargs=weight.act_quant_kwargs,
        reduce_range=weight.reduce_range,
    )
    return nn.Parameter(new, requires_grad=False)


_WAYS: dict[str, Packing] = {
    "Int8Params": (_rows, _into_rows),
    "Params4bit": (_blocks, _into_blocks),
    "Int8Tensor": (_torchao, _into_torchao),
}
