"""DDP and FSDP2 for real: two processes on the CPU, started by Lightning from a script."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_peft import PEFT, last_checkpoint
from lightning_peft.files import shards
from tests.strategies.train import Classifier, fit

FOLDER = Path(__file__).parent
DTYPES = {"ddp": torch.float32, "file": torch.bfloat16, "shards": torch.float32}


def run(script: str, folder: Path, **settings: Any) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(FOLDER.parents[1]), *sys.path])
    runs = [f"{kind}:{setting}" for kind, setting in settings.items()]
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(FOLDER / script), str(folder), *runs],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What came out of four epochs under each strategy, whole, and interrupted after two."""
    folder = tmp_path_factory.mktemp("runs")
    for kind in DTYPES:
        (folder / kind).mkdir()
    dtypes = {kind: str(dtype).removeprefix("torch.") for kind, dtype in DTYPES.items()}
    result = run("train.py", folder, **dtypes)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture(params=DTYPES)
def trained(request: pytest.FixtureRequest, outcome: Path) -> tuple[str, Path, dict[str, Any]]:
    folder = outcome / request.param
    return request.param, folder, json.loads((folder / "results.json").read_text())


def test_the_base_is_frozen_and_the_ranks_agree(trained: Any) -> None:
    kind, _, results = trained
    assert results["world"] == 2
    assert results["base unchanged"] == [True, True]
    assert results["trained equal"] == [True, True]
    assert results["trained unchanged"] == []
    assert results["sharded"] == [kind != "ddp"] * 2


def test_a_resumed_run_ends_bitwise_where_an_uninterrupted_one_does(trained: Any) -> None:
    _, _, results = trained
    assert results["steps"] == 12
    assert results["resume exact"]


def test_the_final_adapter_is_whole(trained: Any) -> None:
    assert trained[2]["exported"]


def test_settings_that_differ_between_processes_are_refused_on_all(trained: Any) -> None:
    assert "the configuration must be the same on all processes" in trained[2]["refused"]
    assert "differs on rank 1 from rank 0" in trained[2]["refused"]


def test_a_run_goes_on_under_another_strategy(outcome: Path) -> None:
    # Three steps an epoch: after the fifth under FSDP2 and after the sixth under DDP.
    assert json.loads((outcome / "changed" / "steps.json").read_text()) == [15, 18]


def test_the_checkpoint_holds_only_what_was_trained(trained: Any) -> None:
    _, folder, results = trained
    path = last_checkpoint(folder / "run")
    files = list(path.glob("*.safetensors")) if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files)
    assert size <= 3.2 * results["trained bytes"] + 64 * 1024


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_one_process_reads_what_two_have_written(trained: Any) -> None:
    kind, folder, _ = trained
    path = last_checkpoint(folder / "run")
    expected = torch.load(folder / "trained.pt")
    if kind == "shards":
        state = shards.read(path, {}, [])["state_dict"]
    else:
        state = PEFT.load_from_checkpoint(Classifier, path, dtype=DTYPES[kind]).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
@pytest.mark.parametrize("kind", ["ddp", "file"])
def test_one_process_goes_on_where_two_left_off(outcome: Path, kind: str, tmp_path: Path) -> None:
    shutil.copytree(outcome / kind / "run", tmp_path / "run")
    _, trainer = fit("none", 1, DTYPES[kind], 5, tmp_path / "run")
    state = trainer.optimizers[0].state
    # Twelve steps by two processes; one alone makes six in an epoch.
    assert {int(entry["step"]) for entry in state.values()} == {12 + 6}


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """What is left of runs in whose second epoch the disk of one process was full."""
    folder = tmp_path_factory.mktemp("refused")
    return folder, run("fail.py", folder, file=0, shards=1, ddp=0)


def test_a_disk_that_refuses_on_one_process_ends_both(refused: tuple[Path, Any]) -> None:
    _, result = refused
    assert result.returncode != 0
    said = [line for line in result.stdout.splitlines() if "CheckpointError" in line]
    assert sorted(line.split(":")[0] for line in said) == [
        "ddp",
        "file",
        "file",
        "shards",
        "shards",
    ]
    assert all("free some space on the disk" in line for line in said)


@pytest.mark.parametrize("kind", DTYPES)
def test_a_disk_that_refuses_leaves_the_checkpoints_of_before(
    refused: tuple[Path, Any], kind: str
) -> None:
    folder = refused[0] / kind / "run"
    first = {"epoch=0-step=3.ckpt", "last.ckpt"}
    manifests = {f"{name}.sha256" for name in first} if kind != "shards" else set()
    assert {file.name for file in folder.iterdir()} == first | manifests
    assert last_checkpoint(folder).name in first
