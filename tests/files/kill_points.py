"""Kill a save at every line of `lightning_peft/files`, one fork each, and look at what is left.

Run as a script: ``python kill_points.py FOLDER (file|shards)``. Prints the number of kills.
"""

import itertools
import os
import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from lightning_peft.files import last_checkpoint as last_checkpoint_module
from lightning_peft.files import shards
from lightning_peft.files.checkpoint_io import AtomicCheckpointIO

FILES = str(Path(last_checkpoint_module.__file__).parent)
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


def die_at(line: int) -> None:
    """Exit without any clean-up when the given line of our code, counted as run, is reached."""
    lines = itertools.count(1)

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(FILES):
            return None
        if event == "line" and next(lines) == line:
            os._exit(KILLED)
        return trace

    sys.settrace(trace)


def killed(save: Any, value: int, path: Path, line: int) -> bool:
    """Save in a child process that dies at a line; return whether it died."""
    if (child := os.fork()) == 0:
        status = 1
        try:
            die_at(line)
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
    for line in itertools.count(1):
        died = killed(save, line, path, line)
        found = last_checkpoint_module.last_checkpoint(folder)
        value = load(found)
        assert value in (present, line), f"killed at {line}: {value}, neither {present} nor {line}"
        assert kind == "shards" or found == path
        present = value
        if not died:
            break
        for leftover in folder.glob(".*.tmp"):
            os.utime(leftover, (0, 0))
    assert present == line, "a save that was not killed is not there"
    left = {file.name for file in folder.iterdir()}
    assert left <= {"last.ckpt", "last.ckpt.sha256"}, left
    print(f"{line - 1} kills")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
