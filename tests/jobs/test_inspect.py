"""`job=inspect` says what is in a folder or file, and refuses what is damaged by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from lightning_peft import LoRA, PrefixTuning, inject
from lightning_peft.errors import CheckpointError
from lightning_peft.files.merged_folder import write_merged
from lightning_peft.inspecting import inspect_path
from lightning_peft.merging.merging import merge
from tests.jobs.command import Run

BRIEF = ["trainer.max_epochs=1", "trainer.limit_train_batches=1", "job.baseline=false"]


def model_of(tiny_model: Path) -> Any:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3)


@pytest.fixture
def saved(tiny_model: Path, tmp_path: Path) -> Path:
    model = model_of(tiny_model)
    return inject(model, LoRA(r=4, targets=["query", "value"]), "mine").save(tmp_path / "mine")


def test_an_adapter_folder(saved: Path, tiny_model: Path, run: Run) -> None:
    done = run("job=inspect", f"path={saved}")
    assert done.code == 0, done.err
    shown = " ".join(done.out.split())
    for part in ("LoRA(r=4", "BertForSequenceClassification", "self.query (2)", "SHA-256", "mine"):
        assert part in shown
    done = run("job=inspect", f"path={saved}", "job.format=json")
    found = json.loads(done.out)
    assert found["targets"] == {
        "bert.encoder.layer.*.attention.self.query": 2,
        "bert.encoder.layer.*.attention.self.value": 2,
    }
    assert found["hosts"] == 4
    assert found["trained_parameters"] == 4 * 4 * 64 + 3 * 33
    assert found["dtypes"] == {"float32": found["tensors"]}
    assert found["in_place"] == ["classifier.bias", "classifier.weight"]
    assert found["finite"] is True


def test_whether_it_fits(saved: Path, tiny_model: Path, tmp_path: Path, run: Run) -> None:
    base = ["model=hf", f"model.name={tiny_model}"]
    done = run("job=inspect", f"path={saved}", *base)
    assert done.code == 0, done.err
    assert "fits" in done.out
    other = model_of(tiny_model)
    with torch.no_grad():
        other.bert.pooler.dense.weight.add_(1)
    other.bert.save_pretrained(tmp_path / "other")
    done = run("job=inspect", f"path={saved}", "model=hf", f"model.name={tmp_path}/other")
    assert done.code == 1
    assert "LoRA(r=4" in done.out
    assert "trained on another base" in done.err


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_what_peft_wrote(tiny_model: Path, tmp_path: Path, run: Run) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: run `pip install '.[dev]'`")
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    peft.get_peft_model(model_of(tiny_model), config).save_pretrained(tmp_path / "theirs")
    base = ["model=hf", f"model.name={tiny_model}"]
    done = run("job=inspect", f"path={tmp_path}/theirs", "job.format=json", *base)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["kind"] == "adapter of peft"
    assert found["targets"] == {"bert.encoder.layer.*.attention.self.query": 2}
    assert found["methods"][0]["r"] == 2
    assert found["in_place"] == ["classifier", "score"]
    assert found["fits"].startswith("yes")


def test_runs_checkpoints_and_merged_models(small: list[str], run: Run) -> None:
    done = run(*small, *BRIEF, "folder=run")
    assert done.code == 0, done.err
    done = run("job=inspect", "path=run")
    assert done.code == 0, done.err
    assert "best.ckpt: epoch 0" in done.out
    assert inspect_path("run")["adapter"]["hosts"] == inspect_path("run/adapter")["hosts"] > 0
    done = run("job=inspect", "path=run/checkpoints/best.ckpt", "job.format=json")
    found = json.loads(done.out)
    assert found["checksum"] == "SHA-256 as saved"
    assert found["step"] == 1
    assert found["parameters"] == inspect_path("run/adapter")["parameters"]
    assert found["fingerprint"] == inspect_path("run/adapter")["fingerprint"]
    name = next(text for text in small if text.startswith("model.name="))
    done = run("job=inspect", "path=run/checkpoints/best.ckpt", "model=hf", name)
    assert done.code == 0, done.err
    assert "yes:" in done.out


def test_a_merged_model(tiny_model: Path, tmp_path: Path) -> None:
    merged = merge(inject(model_of(tiny_model), LoRA()))
    write_merged(merged.model, tmp_path / "merged", [merged.certificate])
    found = inspect_path(tmp_path / "merged")
    assert found["kind"].startswith("merged model")
    assert found["certificates"] == [merged.certificate.to_json()]
    assert found["reloaded"]["relative"] == 0.0


def test_damage_is_named(saved: Path, tmp_path: Path, run: Run) -> None:
    def broken(name: str, change: Any) -> Path:
        folder = shutil.copytree(saved, tmp_path / name)
        change(folder)
        return folder

    def flip(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    cases = {
        "flipped": (flip, "SHA-256 is not the one"),
        "short": (lambda f: (f / "lightning_peft.json").write_text("{"), "must be JSON"),
        "bare": (lambda f: [p.unlink() for p in f.glob("*.json")], "holds neither"),
        "empty": (lambda f: (f / "adapter_model.safetensors").unlink(), "must hold `adapter_model"),
    }
    for name, (change, message) in cases.items():
        done = run("job=inspect", f"path={broken(name, change)}")
        assert done.code == 1, name
        assert message in done.err, name
    (tmp_path / "text.txt").write_text("nothing")
    for path, message in (
        (tmp_path / "text.txt", "damaged"),
        (tmp_path / "nowhere", "must exist"),
        (tmp_path, "must be the folder of an adapter"),
    ):
        done = run("job=inspect", f"path={path}")
        assert done.code == 1
        assert message in done.err
    assert "`path` must name" in run("job=inspect").err
    assert "`job.format`" in run("job=inspect", f"path={saved}", "job.format=yaml").err


def test_a_method_of_ours_alone(tiny_model: Path, tmp_path: Path) -> None:
    adapter = inject(model_of(tiny_model), [LoRA(), PrefixTuning(tokens=2)])
    found = inspect_path(adapter.save(tmp_path / "both"))
    assert found["kind"] == "adapter of lightning-peft"
    assert "bert.encoder.layer.*.attention.self" in found["targets"]


@pytest.mark.parametrize("key", ["auto_mapping", "base_model_name_or_path", "modules_to_save"])
def test_a_setting_of_another_kind_is_named(key: str, tiny_model: Path, tmp_path: Path) -> None:
    inject(model_of(tiny_model), LoRA(r=2)).export(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: 3}))
    with pytest.raises(CheckpointError, match=f"`{key}` in .*adapter_config.json"):
        inspect_path(tmp_path)
