"""Kill a save before each change that it makes to the disk, and look at what is left.

Run as a script: ``python kill_points.py FOLDER (file|shards)``. Prints the number of kills.
"""

import itertools
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from lightning_peft.files import shards
from lightning_peft.files.checkpoint_io import AtomicCheckpointIO
from lightning_peft.files.last_checkpoint import last_checkpoint

CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}
KILLED = 9


def checkpoint(value: int) -> dict[str, Any]:
    return {"state_dict": {"w": torch.full((300,), float(value))}, "value": value}


def save_file(value: int, path: Path) -> None:
    AtomicCheckpointIO().save_checkpoint(checkpoint(value), path)


def save_shards(value: int, path: Path) -> None:
    content = checkpoint(value)
    shards.prepare(path)
    shards.write(content, path)
    shards.finish(content, path)


def load(path: Path) -> int:
    if path.is_dir():
        content = shards.read(path, {}, [])
    else:
        content = AtomicCheckpointIO().load_checkpoint(path)
    assert torch.equal(content["state_dict"]["w"], checkpoint(content["value"])["state_dict"]["w"])
    return content["value"]


def die_before(step: int, folder: Path) -> None:
    """Exit without any clean-up before the given change to `folder`, counted from 1."""
    steps = itertools.count(1)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGES:
            return
        # Inside a tree that is removed, names are relative to an open folder.
        inside = event in ("os.remove", "os.rmdir") and arguments[1] != -1
        here = inside or str(arguments[0]).startswith(str(folder))
        reads = event == "open" and not (arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if here and not reads and next(steps) == step:
            os._exit(KILLED)

    sys.addaudithook(watch)


def killed(save: Any, value: int, path: Path) -> bool:
    """Save in a child process that dies before change number `value`; return whether it died."""
    if (child := os.fork()) == 0:
        status = 1
        try:
            die_before(value, path.parent)
            save(value, path)
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, KILLED), status
    return status == KILLED


def main(folder: Path, kind: str) -> None:
    save = {"file": save_file, "shards": save_shards}[kind]
    warnings.filterwarnings("ignore", message=".*no process group.*|torch.distributed is")
    path = folder / "last.ckpt"
    save(0, path)
    present = 0
    for step in itertools.count(1):
        died = killed(save, step, path)
        found = last_checkpoint(folder)
        value = load(found)
        assert value in (present, step), f"killed at {step}: {value}, not {present} or {step}"
        assert kind == "shards" or found == path
        present = value
        if not died:
            break
        for leftover in folder.glob(".*.tmp"):
            os.utime(leftover, (0, 0))
    assert present == step, "a save that was not killed is not there"
    left = {file.name for file in folder.iterdir()}
    assert left <= {"last.ckpt", "last.ckpt.sha256"}, left
    print(f"{step - 1} kills")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
