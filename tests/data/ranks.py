"""Two processes that share rows, for test_sharing.py: python ranks.py <folder>."""

import json
import sys
from pathlib import Path

from torch import distributed, multiprocessing

from tests.data import numbered

FOLDER = Path(sys.argv[1])


def share(rank: int) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{FOLDER}/meet", rank=rank, world_size=2
    )
    whole = numbered.data(FOLDER / str(rank))
    whole.setup("fit")
    streamed = numbered.data(FOLDER / str(rank), streaming=True)
    ordered = numbered.data(FOLDER / str(rank), by_length=True)
    markets = numbered.markets(FOLDER / str(rank))
    markets.setup("fit")
    found = {
        "validation": numbered.read(whole.val_dataloader()),
        "streamed": numbered.read(streamed.train_dataloader()),
        "ordered": numbered.read(ordered.train_dataloader()),
        "of markets": numbered.read(markets.val_dataloader()),
        "in turn": numbered.read(markets.train_dataloader()),
    }
    (FOLDER / f"{rank}.json").write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    for rank in range(2):
        (FOLDER / str(rank)).mkdir()
    multiprocessing.start_processes(share, nprocs=2, start_method="fork")
