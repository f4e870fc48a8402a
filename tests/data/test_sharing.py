import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_peft.data.sharing import shares


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
    streamed = [row for one in found for batch in one["streamed"] for row in batch]
    assert sorted(streamed) == list(range(100))
    assert len(found[0]["streamed"]) == len(found[1]["streamed"])
