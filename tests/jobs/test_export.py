"""`job=export` writes what other libraries read: peft's folder, or a plain model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lightning_peft.module import PEFTModule
from tests.jobs.command import Run

peft = pytest.importorskip("peft", reason="peft is not installed: run `pip install '.[dev]'`")

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

BRIEF = ["trainer.max_epochs=1", "trainer.limit_train_batches=4", "job.baseline=false"]


@pytest.fixture
def fitted(small: list[str], run: Run) -> Path:
    """The folder of a short run of two methods, in the folder of the test."""
    done = run(*small, *BRIEF, "method=[lora,ia3]", "folder=run", "optimizer.lr=0.05")
    assert done.code == 0, done.err
    return Path("run").absolute()


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    batch = tokenizer(["great coffee", "the tea was awful"], padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**batch).logits


def test_a_run_and_an_adapter_are_exported(fitted: Path, run: Run) -> None:
    refused = run("job=export", f"run={fitted}")
    assert refused.code == 1
    assert "peft has no combination of methods" in refused.err
    assert not (fitted / "peft").exists()

    done = run("job=export", f"run={fitted}", "job.part=lora")
    assert done.code == 0, done.err
    assert "adapter_model.safetensors" in done.out
    settings = json.loads((fitted / "peft" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (settings["peft_type"], settings["task_type"]) == ("LORA", "SEQ_CLS")
    assert settings["modules_to_save"] == ["classifier"]

    model = yaml.safe_load((fitted / "config.yaml").read_text(encoding="utf-8"))["model"]["name"]
    source = ["model=hf", f"model.name={model}"]
    done = run(
        "job=export", *source, f"job.adapter={fitted}/peft", "job.output=again", "job.format=peft"
    )
    assert done.code == 0, done.err
    tokenizer = AutoTokenizer.from_pretrained(model)
    tuned = PEFTModule.load_from_checkpoint(fitted / "checkpoints" / "best.ckpt")
    for _, _, delta in tuned.adapter.deltas:  # what is left without the other part
        if type(delta).__name__ != "LowRank":
            torch.nn.init.ones_(delta.scale)
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    theirs = peft.PeftModel.from_pretrained(base, "again")
    expected = logits(tuned.model, tokenizer)
    torch.testing.assert_close(logits(theirs, tokenizer), expected, rtol=1e-5, atol=1e-6)

    again = run("job=export", f"run={fitted}", "job.part=lora")
    assert again.code == 1
    assert "`job.output` must not exist yet" in again.err

    plain = run("job=export", *source, f"job.adapter={fitted}/peft", "job.format=merged")
    assert plain.code == 0, plain.err
    merged = AutoModelForSequenceClassification.from_pretrained(fitted / "peft-merged")
    torch.testing.assert_close(logits(merged, tokenizer), expected, rtol=1e-4, atol=1e-5)


def test_mistakes_are_one_sentence(run: Run) -> None:
    for arguments, message in (
        ((), "`run` must be the folder"),
        (("job.adapter=nowhere",), "must be the folder of an adapter"),
        (("job.format=pef",), "`job.format` must be one of adapterhub, peft"),
        (("job.format=merged", "job.part=lora"), "`job.part` must be null"),
    ):
        done = run("job=export", *arguments)
        assert done.code == 1
        assert message in done.err
