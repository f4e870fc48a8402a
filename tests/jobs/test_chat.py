"""Chat from the command line: the recipe, small, and a conversation through a pipe."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs.command import Command, Run
from tests.jobs.test_runs import command
from tests.tiny_chat import chat, save_tiny, write_rows


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The recipe's name, and overrides that make it small."""
    folder = tmp_path_factory.mktemp("chat")
    rows = [{"messages": chat(f"hello {i}", "fine", "how are you", "fine")} for i in range(24)]
    paths = {
        split: write_rows(folder / f"{split}.jsonl", rows[a:b])
        for split, a, b in (("train", 0, 16), ("validation", 16, 20), ("test", 20, 24))
    }
    names = ", ".join(f"{split}: {path}" for split, path in paths.items())
    return [
        "experiment=chat_chitchat",
        "model=hf",
        f"model.name={save_tiny(folder / 'tiny')}",
        "data=chat",
        f"data.path={{{names}}}",
        "task.samples=2",
        "task.max_new_tokens=6",
        "trainer.max_epochs=2",
    ]


@pytest.fixture(scope="module")
def fitted(recipe: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Command]:
    folder = tmp_path_factory.mktemp("fit")
    return folder / "run", command(*recipe, "folder=run", cwd=folder)


@pytest.fixture(scope="module")
def other(recipe: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of another method on the same base."""
    folder = tmp_path_factory.mktemp("other")
    settings = ["method=lora", "trainer.max_epochs=1", "job.baseline=false", "data.pack=true"]
    done = command(*recipe, *settings, "folder=polite", cwd=folder)
    assert done.code == 0, done.err
    return folder / "polite"


def test_the_recipe_learns_and_reports(fitted: tuple[Path, Command]) -> None:
    folder, done = fitted
    assert done.code == 0, done.err
    for noise in ("Warning", "Traceback"):
        assert noise not in done.out + done.err
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    base, tuned = report["results"]
    assert base["name"] == "untouched base"
    assert base["trained"] == 0
    assert tuned["test"]["perplexity"] < base["test"]["perplexity"]
    assert set(tuned["test"]) == {"loss", "perplexity", "accuracy", "relevance", "distinct_2"}
    assert [example["text"] for example in report["examples"]] == ["how are you"] * 2
    assert {example["gold"] for example in report["examples"]} == {"fine"}


def test_a_run_is_scored_on_other_files(fitted: tuple[Path, Command], run: Run) -> None:
    write_rows(Path("new.jsonl"), [{"conversations": [
        {"from": "human", "value": "hello"}, {"from": "gpt", "value": "fine"}]}] * 3)  # fmt: skip
    done = run("job=test", f"run={fitted[0]}", "data.path=new.jsonl")
    assert done.code == 0, done.err
    assert "test: 3 rows, best.ckpt" in done.out
    assert "test perplexity:" in done.out


def test_each_conversation_of_a_file_is_answered(fitted: tuple[Path, Command], run: Run) -> None:
    Path("new.txt").write_text("hello 5\nhow are you\n", encoding="utf-8")
    done = run("job=predict", f"run={fitted[0]}", "data.path=new.txt")
    assert done.code == 0, done.err
    lines = Path("new.txt.predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = list(map(json.loads, lines))
    assert [row["text"] for row in rows] == ["hello 5", "how are you"]
    assert all(isinstance(row["answer"], str) for row in rows)


def test_a_bad_file_is_refused(fitted: tuple[Path, Command], run: Run) -> None:
    write_rows(Path("bad.jsonl"), [{"messages": [{"role": "bot", "content": "x"}]}])
    done = run("job=test", f"run={fitted[0]}", "data.path=bad.jsonl")
    assert done.code == 1
    assert "row 1 of `" in done.err
    assert "bad.jsonl` cannot be used: message 1 must be of system, user, assistant" in done.err


def test_virtual_tokens_and_packing_are_refused_together(recipe: list[str], run: Run) -> None:
    done = run(*recipe, "data.pack=true", "folder=run")
    assert done.code == 1
    assert "`data.pack` must be false" in done.err
    assert not Path("run").exists()


def talk(folder: Path, text: str, *settings: str) -> subprocess.CompletedProcess[str]:
    arguments = ["job=chat", f"run={folder}", "job.max_new_tokens=5", *settings]
    return subprocess.run(
        [sys.executable, "-m", "lightning_peft.cli", *arguments],
        input=text, capture_output=True, text=True, cwd=folder, timeout=120, check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_a_conversation_through_a_pipe(fitted: tuple[Path, Command], other: Path) -> None:
    lines = [
        "/help", "/save", "hello 3", "how are you", "/adapter", "/adapter polit", "/adapter polite",
        "how are you", "/save", "/base", "hello", "/save mine.jsonl", "/rest", "/reset", "/save",
    ]  # fmt: skip
    adapters = f"job.adapters=[{other / 'adapter'}]"
    done = talk(fitted[0], "\n".join(lines) + "\n", adapters, "job.system=be kind")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    out = done.stdout
    assert "Talking with default; /help tells the commands." in out
    assert "/adapter <name>" in out
    assert "The adapters are default, polite." in out
    assert "There is no adapter 'polit'. Did you mean `polite`?" in out
    assert "polite> how are you" in out
    assert "base> hello" in out
    assert "There is no command '/rest'. Did you mean `/reset`" in out
    assert out.count("There is nothing to save yet.") == 2
    (kept,) = map(json.loads, (fitted[0] / "chats.jsonl").read_text().splitlines())
    roles = [turn["role"] for turn in kept["messages"]]
    assert roles == ["system", *["user", "assistant"] * 3]
    for turn in kept["messages"][2::2]:
        assert turn["content"] in out
    (mine,) = map(json.loads, (fitted[0] / "mine.jsonl").read_text().splitlines())
    assert len(mine["messages"]) == 9


def test_settings_of_a_talk_are_checked(fitted: tuple[Path, Command], run: Run) -> None:
    for setting, message in (
        ("job.top_p=0", "`job.top_p` must be above 0 and at most 1, but is 0"),
        ("job.temperature=-1", "`job.temperature` must be 0 or more"),
        ("job.max_new_tokens=1024", "must leave room in the 1,024 tokens"),
        ("job.adapters=[nowhere]", "nowhere"),
    ):
        done = run("job=chat", f"run={fitted[0]}", setting)
        assert done.code == 1
        assert message in done.err
