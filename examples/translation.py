"""Teach an English-German translator French, with LoRA.

    python examples/translation.py
    python examples/translation.py --base-rows 29000 --base-epochs 10 --rows 29000 --epochs 2
    python examples/translation.py --source mine.en --target mine.it --text "A dog runs."

No pretrained translator is needed: a small one learns English to German first, from nothing, once.
The sentences are lines of plain files that belong together by number, by default the captions of
Multi30k beside the checkout. Needs `pip install '.[translation]'`.
"""

import argparse
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything

from lightning_peft import LoRA, PEFTModule
from lightning_peft.callbacks import TrainingSummary, progress_bar
from lightning_peft.data.generation import GenerationData
from lightning_peft.models import ModelSource
from lightning_peft.pretraining import Translator
from lightning_peft.tasks.translation import Translation

MULTI30K = Path(__file__).parents[2] / "shared" / "data" / "multi30k"


def main() -> None:
    args = parse()
    seed_everything(args.seed)

    # A T5 of a few million weights; trained the first time, found in the hub's cache afterwards.
    captions = {
        split: {
            "source": str(args.base / f"{name}.en.gz"),
            "target": str(args.base / f"{name}.de.gz"),
        }
        for split, name in (("train", "train"), ("validation", "val"))
    }
    recipe = Translator(path=captions, epochs=args.base_epochs, limit=args.base_rows, d_model=192)
    base = ModelSource(name="multi30k-en-de", trained=recipe)

    # Lines of English and what they are in the new language; a tenth is held out to validate on.
    data = GenerationData(
        path={"source": str(args.source), "target": str(args.target)},
        limit=args.rows,
        batch_size=32,
        by_length=True,
        max_source=64,
        max_target=64,
    )
    # The task gives the data the base's tokenizer, and learns from them how the base writes.
    task = Translation(max_new_tokens=48, samples=64)
    task.equip(data, base)
    module = PEFTModule(base, LoRA(r=args.rank), task, lr=3e-3)

    trainer = Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        gradient_clip_val=1.0,
        callbacks=[TrainingSummary(), progress_bar()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    print("adapter:", module.adapter.save(args.folder / "adapter"))

    # In a fit only the loss is validated. Now sentences are written, and scored as texts.
    batches, rows = task.asked(data.val_dataloader())
    written = [one for batch in trainer.predict(module, batches) for one in batch]
    right = data.targets("validation")
    for name, score in task.scores([right[row] for row in rows], written).items():
        print(f"{name}: {score:.1f}")

    args.folder.joinpath("new.txt").write_text(f"{args.text}\n", encoding="utf-8")
    new = GenerationData(path=str(args.folder / "new.txt"))
    task.equip(new, base)
    new.setup("predict")
    ((found,),) = trainer.predict(module, new.predict_dataloader())
    print(f"{args.text!r} is {found['text']!r}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", type=Path, default=MULTI30K / "train.en.gz")
    parser.add_argument("--target", type=Path, default=MULTI30K / "train.fr.gz")
    parser.add_argument("--rows", type=int, default=2000, help="sentences of each split at most")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8, help="LoRA's rank")
    parser.add_argument("--base", type=Path, default=MULTI30K, help="folder with train and val")
    parser.add_argument("--base-rows", type=int, default=4000)
    parser.add_argument("--base-epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", default="Two men are playing in the snow.")
    parser.add_argument("--folder", type=Path, default=Path("runs/translation"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
