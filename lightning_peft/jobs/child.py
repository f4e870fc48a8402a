"""A command in a process of its own, which is told when this one is to end."""

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TextIO

from lightning_peft.jobs.run_folder import FOLDER_VARIABLE

COMMAND = [sys.executable, "-m", "lightning_peft.cli"]
"""What stands for `lightning-peft`, also where its script is not on the path."""

_LINES = 50  # of the log in which the reason of a failure is looked for


def run_command(arguments: Sequence[str], log: Path, show: Callable[[str], None]) -> str:
    """Run `lightning-peft` with arguments, and wait until it ends.

    It is a process group of its own, so that Ctrl-C reaches this process first, which passes it on
    once: a second signal would stop the saving of the checkpoint.

    Args:
        arguments: What stands behind `lightning-peft`.
        log: File to write what the command prints.
        show: Called with each line of it.

    Returns:
        Why it failed, or nothing.

    Raises:
        KeyboardInterrupt: This process was interrupted; the command has saved and ended.
        SystemExit: This process was asked to end; so was the command.
    """
    last: deque[str] = deque(maxlen=_LINES)
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(  # noqa: S603
            [*COMMAND, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=environment(),
            process_group=0,
        ) as process,
        _passed_on(process, file),
    ):
        for line in _lines(process, file):
            last.append(line)
            show(line)
        code = process.wait()
    return _reason(code, list(last)) if code else ""


def environment() -> dict[str, str]:
    """Return the environment of a command: it finds what this process can import."""
    kept = {name: value for name, value in os.environ.items() if name != FOLDER_VARIABLE}
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def _lines(process: "subprocess.Popen[str]", log: TextIO) -> Iterator[str]:
    for line in process.stdout or ():
        log.write(line)
        log.flush()
        yield line.rstrip()


@contextmanager
def _passed_on(process: "subprocess.Popen[str]", log: TextIO) -> Iterator[None]:
    """Pass on to the command what ends this process, and let it save what it has."""
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    except BaseException as stop:
        interrupted = isinstance(stop, KeyboardInterrupt)
        os.killpg(process.pid, signal.SIGINT if interrupted else signal.SIGTERM)
        try:
            deque(_lines(process, log), maxlen=0)
        except BaseException:  # a second Ctrl-C, of one who does not want to wait
            os.killpg(process.pid, signal.SIGKILL)
            raise
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _reason(code: int, lines: Sequence[str]) -> str:
    """Return why a command failed: its own sentence, else the last line and the exit code."""
    for line in reversed(lines):
        if line.startswith("Error: "):
            return line.removeprefix("Error: ")
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    told = [line for line in lines if line.strip()]
    return f"{told[-1].strip()} ({how})" if told else f"it ended with {how}"
