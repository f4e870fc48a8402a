"""The examples of translation and summarisation run as they are written."""

import gzip
import json
import runpy
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.tiny_chat import save_tiny

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = [
    pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode"),
    pytest.mark.filterwarnings("ignore:The '.*' does not have many workers"),
]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "cache"))


def test_translation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train", "val"):
        for language in ("en", "de", "fr"):
            lines = "".join(f"{language} {i} {name}\n" for i in range(24))
            (tmp_path / f"{name}.{language}.gz").write_bytes(gzip.compress(lines.encode()))
    files = ["--base", ".", "--source", "train.en.gz", "--target", "train.fr.gz"]
    small = ["--base-epochs", "1", "--epochs", "1", "--rank", "2", "--folder", "run"]
    monkeypatch.setattr(sys, "argv", ["translation.py", *files, *small])
    runpy.run_path(str(EXAMPLES / "translation.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert "bleu: " in shown
    assert "'Two men are playing in the snow.' is " in shown
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_summarisation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"dialogue": f"#Person1#: Hi {i}!", "summary": "#Person1# greets."} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "new.txt").write_text("Ann: Hello\n", encoding="utf-8")
    files = ["--file", "rows.jsonl", "--new", "new.txt", "--folder", "run"]
    small = ["--model", str(save_tiny(tmp_path / "tiny")), "--samples", "2"]
    monkeypatch.setattr(sys, "argv", ["summarisation.py", *files, *small])
    runpy.run_path(str(EXAMPLES / "summarisation.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert "rougeL: " in shown
    assert "references {'words': 2.0" in shown
    assert "summary: " in shown
