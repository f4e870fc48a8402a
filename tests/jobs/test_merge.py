"""`job=merge` writes a plain model that computes what the run's adapter did."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lightning_peft import LoRA, PromptTuning, inject
from lightning_peft.merging.certificate import TOLERANCES
from lightning_peft.module import PEFTModule
from tests.jobs.command import Run

BRIEF = ["trainer.max_epochs=1", "trainer.limit_train_batches=4", "job.baseline=false"]


@pytest.fixture
def fitted(small: list[str], run: Run) -> Path:
    """The folder of a short run, in the folder of the test."""
    done = run(*small, *BRIEF, "folder=run", "optimizer.lr=0.05")
    assert done.code == 0, done.err
    return Path("run").absolute()


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    batch = tokenizer(["great coffee", "the tea was awful"], padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**batch).logits


def test_a_run_becomes_a_plain_model(fitted: Path, run: Run) -> None:
    done = run("job=merge", f"run={fitted}")
    assert done.code == 0, done.err
    assert "within" in done.out
    assert "bfloat16" in done.out
    folder = fitted / "merged"
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "merge.json"} <= names
    assert not any("lightning_peft" in name for name in load_file(folder / "model.safetensors"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    tuned = PEFTModule.load_from_checkpoint(fitted / "checkpoints" / "best.ckpt").model
    expected = logits(tuned, tokenizer)
    torch.testing.assert_close(logits(plain, tokenizer), expected, rtol=1e-4, atol=1e-5)
    assert plain.config.id2label == {0: "bad", 1: "good"}
    record = json.loads((folder / "merge.json").read_text(encoding="utf-8"))
    first, second = record["certificates"]
    assert (first["dtype"], second["dtype"]) == ("float32", "bfloat16")
    assert first["relative"] <= first["tolerance"] == TOLERANCES["float32"]
    assert first["effect"] > first["relative"]
    assert first["methods"][0]["_target_"] == "lightning_peft.methods.LoRA"
    assert record["reloaded"]["relative"] == 0.0

    again = run("job=merge", f"run={fitted}")
    assert again.code == 1
    assert "`job.output` must not exist yet" in again.err

    shutil.rmtree(folder)
    (fitted / "adapter").rename(fitted / "alone")
    half = run(
        "job=merge", "model=hf", f"model.name={model_of(fitted)}", f"job.adapter={fitted}/alone",
        "job.dtype=bfloat16", "job.output=half", "job.also=[]",
    )  # fmt: skip
    assert half.code == 0, half.err
    plain = AutoModelForSequenceClassification.from_pretrained("half")
    assert plain.dtype == torch.bfloat16
    torch.testing.assert_close(logits(plain, tokenizer).float(), expected, rtol=0.05, atol=0.05)
    record = json.loads(Path("half/merge.json").read_text(encoding="utf-8"))
    assert len(record["certificates"]) == 1
    assert 0 < record["reloaded"]["relative"] < TOLERANCES["bfloat16"]


def model_of(fitted: Path) -> str:
    return yaml.safe_load((fitted / "config.yaml").read_text(encoding="utf-8"))["model"]["name"]


def test_mistakes_are_one_sentence(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ((), "`run` must be the folder"),
        (("job.adapter=nowhere",), "must be the folder of an adapter"),
        (("job.adapter=nowhere", "job.dtype=int8"), "name 'int8'"),
    ):
        done = run("job=merge", *arguments)
        assert done.code == 1
        assert message in done.err
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3)
    adapter = inject(model, [LoRA(), PromptTuning(tokens=2)])
    adapter.save(tmp_path / "both")
    base = ["model=hf", f"model.name={tiny_model}"]
    done = run("job=merge", *base, f"job.adapter={tmp_path}/both")
    assert done.code == 1
    assert "what `prompt` does" in done.err
    assert not (tmp_path / "merged").exists()
