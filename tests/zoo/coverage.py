"""The coverage table: every method on every architecture, with no configuration.

    python -m tests.zoo.coverage [--methods lora ...] [--heads "causal LM" ...] [--names Llama ...]
                                 [--resume results.json] [--workers 1] [--seconds 60]

Models run in worker processes, each under a time limit, so that a crash or a hang costs one cell.
Results are written as they come; a run with the same `--resume` goes on where the last one ended.
"""

import argparse
import collections
import copy
import gc
import json
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, cast

from tests.zoo.heads import HEADS, cells

ROOT = Path(__file__).parents[2]
METHODS = sorted(path.stem for path in (ROOT / "conf" / "method").glob("*.yaml"))
RECYCLE = 60
"""So many models run in one process, to bound its memory."""

_NAMES = re.compile(
    r"\b[A-Z]\w*(?:Model|For|LMHead|coder)\w*\b|`(?:\w+\.)+\w+`|(?<=: )(?:\w+\.)+\w+.*"
    r"|\d[\d,]* tensors, such as .*(?=: their)|\(\d+x\d+ and \d+x\d+\)"
)
"""What differs between errors of one cause: names of classes and of tensors, and shapes."""

_LONGEST, _MOST = 240, 40

Cell = tuple[str, str]
Results = dict[str, dict[str, Any]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing in the results, then print the table."""
    options = _parser().parse_args(arguments)
    if options.worker:
        _work()
        return
    path = Path(options.resume)
    results: Results = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    wanted = [(h, n) for h, n in cells() if h in options.heads and _named(n, options.names)]
    missing = [cell for cell in wanted if _methods_left(results, cell, options.methods)]
    _run(missing, results, options, path)
    print(table(results, wanted, options.methods))
    print(total(results, wanted, options.methods))
    print(report(results, wanted, options.methods))


def table(results: Results, wanted: Sequence[Cell], methods: Sequence[str]) -> str:
    """Return the Markdown table: how many architectures of each head every method trains.

    Behind them, where there are any, those that it refuses, and those that fail.
    """
    heads = list(dict.fromkeys(head for head, _ in wanted))
    rows = {
        h: [row for row in _rows(results, wanted, h) if "unavailable" not in row] for h in heads
    }
    lines = [f"| method | {' | '.join(f'{h} ({len(rows[h])})' for h in heads)} |"]
    lines += ["| --- |" + " ---: |" * len(heads)]
    lines += [f"| {m} | {' | '.join(_count(rows[h], m) for h in heads)} |" for m in methods]
    return "\n".join(lines) + "\n"


def _rows(results: Results, wanted: Sequence[Cell], head: str) -> list[dict[str, Any]]:
    return [results.get(_key(cell), {}) for cell in wanted if cell[0] == head]


def _count(rows: Sequence[dict[str, Any]], method: str) -> str:
    counts = collections.Counter(_status(row, method) for row in rows)
    beside = [f"{counts[s]} {s}" for s in ("refused", "failed") if counts[s]]
    return f"{counts['ok']}" + (f" ({', '.join(beside)})" if beside else "")


def total(results: Results, wanted: Sequence[Cell], methods: Sequence[str]) -> str:
    """Return how all cells of what could be built went, in a sentence."""
    rows = [results.get(_key(cell), {}) for cell in wanted]
    counts = collections.Counter(
        _status(row, m) for row in rows if "unavailable" not in row for m in methods
    )
    return (
        f"Of {sum(counts.values()):,} cells {counts['ok']:,} train, {counts['refused']:,} are "
        f"refused by an error that says why, and {counts['failed']:,} fail.\n"
    )


def report(results: Results, wanted: Sequence[Cell], methods: Sequence[str]) -> str:
    """Return the failures, refusals and unavailable models, those of one cause together."""
    groups: dict[str, dict[str, set[str]]] = collections.defaultdict(
        lambda: collections.defaultdict(set)
    )
    for cell in wanted:
        row = results.get(_key(cell), {})
        if "unavailable" in row:
            groups[f"not built here: {row['unavailable']}"]["all"].add(cell[1])
        for method in methods:
            if _status(row, method) in ("refused", "failed"):
                entry = row[method]
                cause = _NAMES.sub("...", entry["message"].replace("\n", " "))[:_LONGEST]
                groups[f"{entry['status']}: {cause}"][method].add(cell[1])
    return "\n".join(_told(cause, by_method) for cause, by_method in sorted(groups.items()))


def _told(cause: str, by_method: Mapping[str, set[str]]) -> str:
    """Return a cause with its methods, those of the same architectures together."""
    alike: dict[str, list[str]] = collections.defaultdict(list)
    for method, names in by_method.items():
        shown, more = sorted(names)[:_MOST], len(names) - _MOST
        beside = [f"and {more} more"] if more > 0 else []
        alike[", ".join([*shown, *beside])].append(f"`{method}`")
    lines = [f"  - {', '.join(methods)}: {names}" for names, methods in alike.items()]
    return "\n".join([f"- {cause}", *lines])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tests.zoo.coverage")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--heads", nargs="+", choices=list(HEADS), default=list(HEADS))
    parser.add_argument("--names", nargs="+", default=[], help="parts of class names")
    parser.add_argument("--resume", default="coverage.json", help="the file of results")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60, help="time limit of one model")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def _named(name: str, parts: Sequence[str]) -> bool:
    return not parts or any(part in name for part in parts)


def _key(cell: Cell) -> str:
    return "/".join(cell)


def _status(row: dict[str, Any], method: str) -> str:
    return str(row.get(method, {}).get("status", ""))


def _methods_left(results: Results, cell: Cell, methods: Sequence[str]) -> list[str]:
    row = results.get(_key(cell), {})
    return [] if "unavailable" in row else [m for m in methods if m not in row]


def _run(missing: list[Cell], results: Results, options: Any, path: Path) -> None:
    lock, done = threading.Lock(), 0

    def keep(cell: Cell, row: dict[str, Any]) -> None:
        nonlocal done
        with lock:
            done += 1
            results.setdefault(_key(cell), {}).update(row)
            _write(path, results)
            print(f"{done}/{len(missing)} {_key(cell)}: {_summary(row)}", file=sys.stderr)

    def run_chunk(chunk: list[Cell]) -> None:
        tasks = [(cell, _methods_left(results, cell, options.methods)) for cell in chunk]
        while tasks:
            for cell, row in _worked(tasks, options.seconds):
                keep(cell, row)
                tasks.pop(0)

    with ThreadPoolExecutor(options.workers) as pool:
        list(
            pool.map(run_chunk, [missing[i : i + RECYCLE] for i in range(0, len(missing), RECYCLE)])
        )


def _write(path: Path, results: Results) -> None:
    """Replace the file at once, so that a run that is killed leaves a whole one."""
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(json.dumps(results, indent=1), encoding="utf-8")
    beside.replace(path)


def _summary(row: dict[str, Any]) -> str:
    if "unavailable" in row:
        return f"unavailable, {row['unavailable']}"
    return ", ".join(f"{method} {entry['status']}" for method, entry in row.items())


def _worked(
    tasks: Sequence[tuple[Cell, list[str]]], seconds: float
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Give each task's result; the last one given may be that of a process that had to end."""
    command = [sys.executable, "-m", "tests.zoo.coverage", "--worker"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_pump, args=(process.stdout, lines), daemon=True).start()
    sender, limit = cast(IO[str], process.stdin), seconds * 2
    try:
        for cell, methods in list(tasks):
            sender.write(json.dumps([*cell, methods]) + "\n")
            sender.flush()
            try:
                line = lines.get(timeout=limit * len(methods))
            except queue.Empty:
                yield cell, _lost(methods, f"no result within {seconds:g} s")
                return
            if not line:
                yield cell, _lost(methods, f"the process ended with code {process.wait()}")
                return
            yield cell, json.loads(line)
            limit = seconds  # the first one's time was for the imports too
    finally:
        process.kill()
        process.wait()


def _pump(stream: Any, lines: "queue.Queue[str]") -> None:
    for line in stream:
        lines.put(line)
    lines.put("")


def _lost(methods: Sequence[str], message: str) -> dict[str, Any]:
    return {method: {"status": "failed", "message": message, "idle": []} for method in methods}


def _work() -> None:
    """Answer tasks from stdin, one a line, with one line of results each."""
    out, sys.stdout = sys.stdout, sys.stderr  # what models print must not mix with the results
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        head, name, methods = json.loads(line)
        print(json.dumps(_cell(head, name, methods)), file=out, flush=True)


def _cell(head: str, name: str, methods: Sequence[str]) -> dict[str, Any]:
    from tests.zoo.build import Unavailable, build
    from tests.zoo.trains import methods_of, trains

    try:
        cell = build(head, name)
    except Unavailable as error:
        return {"unavailable": str(error)}
    except Exception as error:
        return _lost(methods, f"cannot be built: {type(error).__name__}: {error}")
    row = {m: vars(trains(copy.deepcopy(cell), methods_of(m))) for m in methods}
    gc.collect()  # models are cycles
    return row


if __name__ == "__main__":
    main()
