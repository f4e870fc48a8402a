"""SHA-256 manifests beside checkpoints, in the format that ``sha256sum -c`` reads.

While a file is being replaced its manifest lists the old and the new digest, so a kill at any
point leaves a file that one of the two confirms.
"""

import datetime
import errno
import glob
import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

SUFFIX = ".sha256"
_ABANDONED = 3600  # seconds after which a temporary file belongs to a save that was killed
COMMIT = "complete.sha256"
"""Manifest inside a folder of shards; written last, it marks the folder as complete."""


class Entry(NamedTuple):
    """One line of a manifest: the digest of `name` as saved at `saved` (UTC, ISO 8601)."""

    digest: str
    name: str
    saved: str = ""


def now() -> str:
    """Return the present time as manifests write it; such times sort as text."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")


def manifest_path(path: Path) -> Path:
    """Return where the manifest of the file `path` lies."""
    return path.with_name(path.name + SUFFIX)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(manifest: Path) -> list[Entry]:
    """Return the entries of a manifest; none when it is not there."""
    if not manifest.is_file():
        return []
    entries, saved = [], ""
    for line in manifest.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("# saved "):
            saved = line.removeprefix("# saved ")
        elif line:
            value, _, name = line.partition("  ")
            entries.append(Entry(value, name, saved))
    return entries


def current(path: Path) -> list[Entry]:
    """Return the entry of the file at `path`; none when its manifest is not there.

    After a save that was killed the manifest lists two, and the file's bytes decide.
    """
    entries = read(manifest_path(path))
    if len(entries) > 1:
        present = digest(path)
        entries = [entry for entry in entries if entry.digest == present]
    return entries


def write(manifest: Path, entries: Iterable[Entry]) -> None:
    """Replace a manifest, all or nothing."""
    # `sha256sum -c` skips lines that begin with "#".
    lines = (f"# saved {e.saved}\n{e.digest}  {e.name}\n" for e in entries)
    with replacing(manifest) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path` that takes its place, durably, when the block ends.

    The temporary file lies in the same folder, so the move is a rename and never a copy. When
    the block raises, the file is removed and `path` stays as it was.

    Raises:
        OSError: the folder cannot be written.
    """
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if time.time() - leftover.stat().st_mtime > _ABANDONED:
            leftover.unlink()
    # A name of this process's own: two runs in one folder never write into the same file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's list of names, have reached the disk.

    Raises:
        OSError: the disk refused, for instance because it is full.
    """
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems have no fsync for folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


def commit(folder: Path) -> None:
    """Mark a folder of shards as complete: flush its files and list their digests.

    Raises:
        OSError: the disk refused.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != COMMIT)
    for file in files:
        sync(file)
    saved = now()
    write(folder / COMMIT, [Entry(digest(file), file.name, saved) for file in files])


def is_complete(folder: Path) -> bool:
    """Return whether a folder of shards was saved to its end and is unchanged since."""
    entries = read(folder / COMMIT)
    files = [(folder / entry.name, entry.digest) for entry in entries]
    return bool(files) and all(f.is_file() and digest(f) == value for f, value in files)
