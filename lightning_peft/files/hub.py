"""Adapters on the Hugging Face hub, by the real client: fetched file by file, pushed in one commit.

A name such as `org/name` may be a folder or a repository. A folder of that name wins; where only
its first part is a folder, the name is taken for a misspelt one, and no request is made.
`hf://org/name` always means the hub. Tokens are the client's own: `HF_TOKEN`, or a login.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning_peft.adapter import Adapter
from lightning_peft.errors import CheckpointError, near_misses
from lightning_peft.files.card import card_of

FILES = ("lightning_peft.json", "adapter_config.json", "adapter_model.safetensors")
"""What an adapter is made of: written here, and fetched where it is there."""

ADAPTERHUB = ("adapter.safetensors", "model_head.safetensors")
"""What is fetched too, of an adapter of AdapterHub's."""

SCHEME = "hf://"
CARD = "README.md"

_PART = r"(?!\.{1,2}(?:/|$))[\w.-]+"
_NAME = re.compile(rf"{_PART}/{_PART}(/{_PART})*")
_logger = logging.getLogger(__name__)


def located(source: str | Path, revision: str | None = None, subfolder: str = "") -> Path:
    """Return the folder that `source` means, fetched from the hub if it is there.

    Args:
        source: a folder, or `org/name` on the hub, or `org/name/subfolder`.
        revision: a branch, tag or commit on the hub.
        subfolder: where in the folder, or in the repository, the adapter is.

    Raises:
        CheckpointError: there is no such folder or repository, or no access to it.
    """
    _require_inside(subfolder)
    if isinstance(source, Path) or (not source.startswith(SCHEME) and _is_local(source)):
        return _local(source, revision) / subfolder
    name = source.removeprefix(SCHEME)
    if not _NAME.fullmatch(name):
        raise CheckpointError(f"`{source}` must be `{SCHEME}org/name`, but is not.")
    organisation, repository, *inside = name.split("/")
    if inside and subfolder:
        raise CheckpointError(f"`subfolder` is {subfolder!r}, but `{source}` names one already.")
    return _fetched(f"{organisation}/{repository}", revision, subfolder or "/".join(inside))


def push(
    adapter: Adapter,
    repository: str,
    *,
    subfolder: str = "",
    revision: str | None = None,
    private: bool = True,
    message: str | None = None,
) -> str:
    """Write an adapter to a repository on the hub, in one commit.

    Args:
        adapter: what to write, as `Adapter.save` writes it.
        repository: `org/name`; it is made if it is not there.
        subfolder: where in the repository.
        revision: the branch; the client's default is `main`.
        private: whether a repository that is made is private; one that is there stays as it is.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: the repository's name is none, or the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    name = repository.removeprefix(SCHEME)
    if not re.fullmatch(rf"{_PART}/{_PART}", name):
        raise CheckpointError(f"`repository` must be `org/name`, but is {repository!r} instead.")
    _require_inside(subfolder)
    api, place = HfApi(), f"{subfolder}/" if subfolder else ""
    with TemporaryDirectory() as folder, _explained(name, revision, "write to"):
        adapter.save(folder)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        files[CARD] = card_of(adapter, name, subfolder, set(files)).encode()
        api.create_repo(name, private=private, exist_ok=True)
        present = set(api.list_repo_files(name, revision=revision))
        if f"{place}{CARD}" in present:  # somebody may have written more than we could
            del files[CARD]
        added = [CommitOperationAdd(f"{place}{path}", data) for path, data in files.items()]
        stale = sorted({f"{place}{path}" for path in FILES if path not in files} & present)
        operations: list[Any] = [*added, *map(CommitOperationDelete, stale)]
        text = message or f"Adapter {adapter.name}: {', '.join(m.kind for m in adapter.methods)}"
        commit = api.create_commit(name, operations, commit_message=text, revision=revision)
    return str(commit.commit_url)


def _require_inside(subfolder: str) -> None:
    if subfolder and not re.fullmatch(rf"{_PART}(/{_PART})*", subfolder):
        raise CheckpointError(f"`subfolder` must lie inside, but is {subfolder!r} instead.")


def _is_local(name: str) -> bool:
    first = name.partition("/")[0]
    if Path(name).is_dir() or not _NAME.fullmatch(name):
        return True
    if Path(first).is_dir():
        raise CheckpointError(
            f"`{name}` is no folder, though `{first}` is one.{_similar(Path(name))} For the "
            f"repository of that name on the hub write `{SCHEME}{name}`."
        )
    return False


def _local(source: str | Path, revision: str | None) -> Path:
    if revision is not None:
        raise CheckpointError(
            f"`revision` is one on the hub, but `{source}` is a folder here: leave it out, or "
            f"write `{SCHEME}{source}`."
        )
    if isinstance(source, str) and not Path(source).is_dir():
        raise CheckpointError(
            f"There is no folder `{source}`, and no repository on the hub is called so: they are "
            f"called `org/name`.{_similar(Path(source))}"
        )
    return Path(source)


def _fetched(repository: str, revision: str | None, subfolder: str) -> Path:
    from huggingface_hub import snapshot_download

    place = f"{subfolder}/" if subfolder else ""
    _logger.info("Fetching %s%s from the hub.", f"{repository}/", subfolder)
    with _explained(repository, revision, "read"):
        patterns = [f"{place}{name}" for name in (*FILES, *ADAPTERHUB)]
        root = snapshot_download(repository, revision=revision, allow_patterns=patterns)
    folder = Path(root) / subfolder
    if not any((folder / name).exists() for name in (*FILES, *ADAPTERHUB)):
        raise CheckpointError(
            f"`{repository}` on the hub holds no adapter{f' in `{subfolder}`' if place else ''}: "
            f"`{FILES[2]}` is looked for, and pickles (`adapter_model.bin`) are never read."
        )
    return folder


@contextmanager
def _explained(repository: str, revision: str | None, verb: str) -> Iterator[None]:
    """Say in one sentence what the hub refused; the client's own messages may hold addresses."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        reason = "is gated: ask for access on its page, then log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        reason = (
            f"is not there, or your token does not open it, and there is no folder `{repository}` "
            "here either: mind the spelling of the one that you mean, or log in with "
            "`hf auth login`"
        )
    except errors.RevisionNotFoundError:
        reason = f"has no revision `{revision}`: leave it out for the newest"
    except errors.LocalEntryNotFoundError:
        reason = (
            f"cannot be reached and is not in the cache, and there is no folder `{repository}` "
            "here either: go online once, without HF_HUB_OFFLINE, or name a folder"
        )
    except errors.HfHubHTTPError as error:
        reason = _by_status(error.response.status_code, verb)
    except (errors.OfflineModeIsEnabled, errors.HTTPError) as error:  # type: ignore[attr-defined]
        reason = f"cannot be reached ({type(error).__name__}): check the connection and HF_ENDPOINT"
    else:
        return
    raise CheckpointError(f"`{repository}` on the hub {reason}.") from None


def _by_status(status: int, verb: str) -> str:
    if status in (401, 403):
        return (
            f"may not be {'read' if verb == 'read' else 'written to'} with your token: log in with "
            f"`hf auth login`, with a token that may {verb} it"
        )
    return f"refused the request with status {status}: try again later"


def _similar(folder: Path) -> str:
    siblings: Sequence[str] = []
    if folder.parent.is_dir():
        siblings = [path.as_posix() for path in folder.parent.iterdir() if path.is_dir()]
    return near_misses(folder.as_posix(), siblings)
