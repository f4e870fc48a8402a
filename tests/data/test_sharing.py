import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.data import SequentialSampler

from lightning_peft.data.sharing import SharedBatches, SharedLoader, shares
from tests.data import numbered


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
@pytest.mark.parametrize("rows", [16, 17, 33, 100])
def test_each_row_is_judged_once_and_no_process_waits(rows, batch_size, processes):
    found = shares(rows, batch_size, processes)
    assert len(found) == processes
    assert len({len(batches) for batches in found}) == 1
    sizes = [len(batch) for batches in found for batch in batches]
    assert 1 <= min(sizes) <= max(sizes) <= batch_size
    if rows >= len(sizes):
        assert sorted(row for batches in found for b in batches for row in b) == list(range(rows))


def test_rows_are_repeated_where_there_are_too_few():
    assert shares(1, 8, 3) == [[[0]], [[0]], [[0]]]
    assert {row for batches in shares(2, 8, 3) for batch in batches for row in batch} == {0, 1}


@pytest.mark.parametrize("processes", [2, 3, 5, 9])
def test_processes_deal_out_the_batches_of_an_order(processes):
    found = [
        list(SharedBatches(SequentialSampler(range(20)), 4, rank, processes))
        for rank in range(processes)
    ]
    each = -(-5 // processes)
    assert [len(batches) for batches in found] == [each] * processes
    dealt = [batch for turn in zip(*found, strict=True) for batch in turn]
    whole = [list(range(i, i + 4)) for i in range(0, 20, 4)]
    assert dealt == (whole * 2)[: each * processes]


def test_an_order_is_told_the_epoch_of_its_trainer(tmp_path):
    from lightning.fabric.utilities.data import _set_sampler_epoch

    loader = numbered.data(tmp_path, by_length=True).train_dataloader()
    shared = SharedLoader(loader, SharedBatches(loader.sampler, 3, rank=1, processes=2))
    first = numbered.read(shared)
    assert numbered.read(shared) == first
    _set_sampler_epoch(shared, 1)
    assert numbered.read(shared) != first
    assert len(shared) == len(first) == 17


def flat(found, name) -> list[int]:
    return sorted(row for one in found for batch in one[name] for row in batch)


def ordered(folder: Path) -> list[list[int]]:
    (folder / "alone").mkdir()
    return numbered.read(numbered.data(folder / "alone", by_length=True).train_dataloader())


def test_two_processes_share_the_rows(tmp_path):
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(root / "tests" / "data" / "ranks.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])},
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    judged = [row for one in found for batch in one["validation"] for row in batch]
    assert sorted(judged) == list(range(100, 133))
    assert len(found[0]["validation"]) == len(found[1]["validation"])
    assert flat(found, "of markets") == list(range(100, 133))
    # Each process has whole batches of the order, as if there were no other.
    turns = [batch for one in found for batch in one["in turn"]]
    assert all(len({row % 3 for row in batch}) == 1 for batch in turns)
    assert set(flat(found, "in turn")) == set(range(100))
    assert len({len(one["in turn"]) for one in found}) == 1
    alone = [tuple(batch) for batch in ordered(tmp_path)]
    assert {tuple(batch) for one in found for batch in one["ordered"]} == set(alone)
    assert [len(one["ordered"]) for one in found] == [17, 17]
    streamed = [row for one in found for batch in one["streamed"] for row in batch]
    assert sorted(streamed) == list(range(100))
    assert len(found[0]["streamed"]) == len(found[1]["streamed"])
