"""Adapters on the hub: the real client against a server on this machine."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from lightning_peft import LoRA, PromptTuning, inject, load_adapter
from lightning_peft.adapter import adapters_of
from lightning_peft.errors import CheckpointError
from tests.files.fake_hub import TOKEN, Hub, Repository

Build = Callable[[str], Any]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """An empty hub that the client talks to, with an empty cache and no token."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with Hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.chdir(tmp_path)
        yield hub


@pytest.fixture
def login(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token in the environment."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def trained(build: Build, name: str = "bert", method: Any = None) -> Any:
    example = build(name)
    example.train(inject(example.model, method or LoRA(r=2)).parameters())
    return example


def publish(hub: Hub, build: Build, folder: Path, name: str = "org/name", **settings: Any) -> Any:
    """Put a trained adapter, and files that no adapter needs, on the hub."""
    example = trained(build)
    adapters_of(example.model)["default"].save(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    extra = {"training_args.bin": b"pickle", "README.md": b"text", "optimizer.pt": b"pickle"}
    hub.repositories[name] = Repository(commits=[files | extra], **settings)
    return example


def test_an_adapter_comes_from_the_hub_and_nothing_else_does(
    hub: Hub, build: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    example, other = publish(hub, build, tmp_path / "a"), build("bert")
    with caplog.at_level(logging.INFO, "lightning_peft"):
        load_adapter(other.model, "org/name")
    assert "org/name" in caplog.text
    assert torch.equal(other.logits(), example.logits())
    assert hub.downloads() == sorted(path.name for path in (tmp_path / "a").iterdir())


def test_a_revision_and_a_subfolder(hub: Hub, build: Build, tmp_path: Path) -> None:
    example = publish(hub, build, tmp_path / "a")
    repository = hub.repositories["org/name"]
    old = repository.sha("main")
    moved = {f"runs/best/{name}": data for name, data in repository.commits[0].items()}
    repository.commits.append(moved)
    for source, settings in [
        ("org/name", {"revision": old}),
        ("org/name/runs/best", {}),
        ("hf://org/name", {"subfolder": "runs/best"}),
    ]:
        other = build("bert")
        load_adapter(other.model, source, **settings)
        assert torch.equal(other.logits(), example.logits())
    with pytest.raises(CheckpointError, match=r"org/name` on the hub holds no adapter: .*never"):
        load_adapter(build("bert").model, "org/name")
    with pytest.raises(CheckpointError, match="has no revision `v9`"):
        load_adapter(build("bert").model, "org/name", revision="v9")


def test_what_is_in_the_cache_needs_no_connection(
    hub: Hub, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example, other = publish(hub, build, tmp_path / "a"), build("bert")
    load_adapter(build("bert").model, "org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    load_adapter(other.model, "org/name")
    assert torch.equal(other.logits(), example.logits())
    with pytest.raises(CheckpointError, match="`org/other` on the hub cannot be reached and is no"):
        load_adapter(build("bert").model, "org/other")


def test_a_folder_wins_and_a_misspelt_one_asks_nobody(
    hub: Hub, build: Build, tmp_path: Path
) -> None:
    example, other = publish(hub, build, tmp_path / "a"), build("bert")
    adapters_of(example.model)["default"].save("runs/adapter")
    hub.repositories["runs/adapter"] = Repository(gated=True)
    load_adapter(other.model, "runs/adapter")
    assert torch.equal(other.logits(), example.logits())
    with pytest.raises(CheckpointError, match=r"no folder, .*`runs/adapter`.*hf://runs/adaptr"):
        load_adapter(build("bert").model, "runs/adaptr")
    for wrong in ("adapter", "./org/name", "org//name", "hf://name", "org/../name"):
        with pytest.raises(CheckpointError):
            load_adapter(build("bert").model, wrong)
    for wrong in ("../x", "/x", "x/../../y"):
        with pytest.raises(CheckpointError, match="must lie inside"):
            load_adapter(build("bert").model, "org/name", subfolder=wrong)
    with pytest.raises(CheckpointError, match="`revision` is one on the hub"):
        load_adapter(build("bert").model, "runs/adapter", revision="main")
    assert hub.requests == []


def test_refusals_say_what_to_do_and_change_nothing(hub: Hub, build: Build, tmp_path: Path) -> None:
    publish(hub, build, tmp_path / "a", "org/gated", gated=True)
    publish(hub, build, tmp_path / "a", "org/private", private=True)
    hub.repositories["org/pickle"] = Repository(commits=[{"adapter_model.bin": b"pickle"}])
    example = build("bert")
    before = example.logits()
    for name, reason in [
        ("org/gated", "is gated: ask for access"),
        ("org/private", "your token does not open it, and there is no folder `org/private` here"),
        ("org/nothing", "is not there, or .* no folder `org/nothing` here either"),
        ("org/pickle", "pickles .* are never read"),
    ]:
        with pytest.raises(CheckpointError, match=reason):
            load_adapter(example.model, name)
    assert torch.equal(example.logits(), before)
    assert adapters_of(example.model) == {}


@pytest.mark.usefixtures("login")
def test_a_pushed_adapter_comes_back(hub: Hub, build: Build) -> None:
    example, other = trained(build), build("bert")
    adapter = adapters_of(example.model)["default"]
    address = adapter.push("org/new", message="First")
    repository = hub.repositories["org/new"]
    assert address == f"{hub.endpoint}/org/new/commit/{repository.sha('main')}"
    assert repository.private
    assert repository.messages == ["First"]
    load_adapter(other.model, "org/new")
    assert torch.equal(other.logits(), example.logits())


@pytest.mark.usefixtures("login")
def test_a_second_push_keeps_the_card_and_leaves_nothing_stale(hub: Hub, build: Build) -> None:
    model = trained(build).model
    adapters_of(model)["default"].push("org/new", private=False)
    repository = hub.repositories["org/new"]
    repository.commits[-1]["README.md"] = b"Written by a person."
    assert "adapter_config.json" in repository.commits[-1]
    # Which peft's format does not hold.
    alone = trained(build, method=PromptTuning(tokens=3, layout="clean"))
    adapters_of(alone.model)["default"].push("org/new")
    files = repository.commits[-1]
    assert files["README.md"] == b"Written by a person."
    assert "adapter_config.json" not in files
    assert not repository.private
    other = build("bert")
    load_adapter(other.model, "org/new")
    assert torch.equal(other.logits(), alone.logits())


@pytest.mark.usefixtures("login")
def test_a_card_says_what_is_in_it_and_no_secrets(hub: Hub, build: Build, tmp_path: Path) -> None:
    example = build("bert")
    example.model.config.name_or_path = str(tmp_path / "base")
    adapter = inject(example.model, LoRA(r=2, targets="query"))
    adapter.push("org/new", subfolder="best")
    files = hub.repositories["org/new"].commits[-1]
    card = files["best/README.md"].decode()
    for text in (
        "LoRA",
        "r 2",
        "targets query",
        f"{adapter.num_parameters:,}",
        "classifier.weight",
    ):
        assert text in card
    assert 'load_adapter(model, "org/new/best")' in card
    assert 'from_pretrained(model, "org/new", subfolder="best")' in card
    assert "adapter_config.json" in json.dumps(sorted(files))
    assert str(tmp_path) not in card
    assert TOKEN not in card


def test_pushing_without_permission_is_refused(hub: Hub, build: Build) -> None:
    adapter = inject(build("bert").model, LoRA(r=2))
    with pytest.raises(CheckpointError, match="may not be written to with your token: log in"):
        adapter.push("org/new")
    with pytest.raises(CheckpointError, match="must be `org/name`"):
        adapter.push("new")
    with pytest.raises(CheckpointError, match="must lie inside"):
        adapter.push("org/new", subfolder="../x")
    hub.server.shutdown()
    hub.server.server_close()
    with pytest.raises(CheckpointError, match="cannot be reached") as caught:
        adapter.push("org/new")
    assert "127.0.0.1" not in str(caught.value)
