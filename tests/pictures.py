"""Generated images with boxes, and tiny detectors."""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

COLOURS = {"blue": (20, 40, 220), "red": (220, 30, 20)}


def draw(path: Path, seed: int, size: tuple[int, int] = (64, 48)) -> list[tuple[str, list[int]]]:
    """Write an image with a blue and a red box, and return their classes and corners."""
    generator = torch.Generator().manual_seed(seed)
    picture = Image.new("RGB", size, (128, 128, 128))
    objects = []
    for i, (name, colour) in enumerate(COLOURS.items()):
        left, top = torch.randint(1, 12, (2,), generator=generator).tolist()
        box = [left + 32 * i, top, left + 32 * i + 14, top + 16]
        ImageDraw.Draw(picture).rectangle(box, fill=colour)
        objects.append((name, box))
    picture.save(path)
    return objects


def annotation(objects: list[tuple[str, list[Any]]], extra: str = "") -> str:
    """Return the XML of an image."""
    parts = [
        f"<object><name>{name}</name>{extra}<bndbox><xmin>{b[0]}</xmin><ymin>{b[1]}</ymin>"
        f"<xmax>{b[2]}</xmax><ymax>{b[3]}</ymax></bndbox></object>"
        for name, b in objects
    ]
    return f"<annotation>{''.join(parts)}</annotation>"


def write_voc(folder: Path, counts: dict[str, int]) -> Path:
    """Write a data set in VOC's layout with so many images in each list."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    number = 0
    for split, count in counts.items():
        names = [f"{split}_{i}" for i in range(count)]
        (folder / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            number += 1
            objects = draw(folder / "JPEGImages" / f"{name}.png", number)
            (folder / "Annotations" / f"{name}.xml").write_text(annotation(objects))
    return folder


def write_coco(folder: Path, count: int) -> Path:
    """Write a COCO file with its images beside it."""
    (folder / "images").mkdir(parents=True)
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 7, "name": "red"}, {"id": 3, "name": "blue"}],
    }
    numbers = {one["name"]: one["id"] for one in content["categories"]}
    for i in range(count):
        name = f"{i}.png"
        content["images"].append({"id": 10 + i, "file_name": name, "width": 64, "height": 48})
        for label, (left, top, right, bottom) in draw(folder / "images" / name, i):
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": 10 + i,
                    "category_id": numbers[label],
                    "bbox": [left, top, right - left, bottom - top],
                    "iscrowd": 0,
                }
            )
    file = folder / "all.json"
    file.write_text(json.dumps(content))
    return file


def processor() -> Any:
    """Return an image processor that scales to 28 × 42 pixels."""
    from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil

    return DetrImageProcessorPil(size={"height": 28, "width": 42})


def yolos(classes: int = 2) -> Any:
    """Return a detector without a decoder, whose tokens are the queries."""
    from transformers import YolosConfig, YolosForObjectDetection

    config = YolosConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=[28, 42], patch_size=14, num_detection_tokens=6, num_labels=classes,
        use_mid_position_embeddings=False,
    )  # fmt: skip
    return YolosForObjectDetection(config).eval()


def save_dinov2(folder: Path) -> Path:
    """Save a tiny backbone with an image processor that crops, as DINOv2's does."""
    from transformers import Dinov2Config, Dinov2Model
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=1, image_size=28
    )
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    ).save_pretrained(folder)
    return folder


RF_DETR: dict[str, Any] = {
    "type": "rf_detr",
    "backbone": {"model_type": "rf_detr_dinov2", "num_windows": 1, "out_indices": [1, 2]},
    "d_model": 16, "num_queries": 5, "decoder_layers": 1, "decoder_ffn_dim": 16,
    "decoder_self_attention_heads": 2, "decoder_cross_attention_heads": 2, "c2f_num_blocks": 1,
    "group_detr": 1,
}  # fmt: skip
DETR: dict[str, Any] = {
    "type": "detr",
    "backbone": {"out_indices": [2], "reshape_hidden_states": True},
    "d_model": 16, "num_queries": 5, "encoder_layers": 1, "decoder_layers": 2,
    "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "auxiliary_loss": True,
}  # fmt: skip
