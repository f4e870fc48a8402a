"""A tiny model, tiny files, and the command line in this process."""

import sys
from pathlib import Path

import pytest

from lightning_peft import cli, config
from tests.jobs.command import BAD, GOOD, OTHER, Command, Run, write_rows


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BERT of two small layers, and a tokenizer that knows the words above."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *OTHER]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)
    settings = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertModel(
            BertConfig(vocab_size=len(words), hidden_size=32, intermediate_size=48, **settings)
        )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.csv (40 rows), test.csv (20) and new.csv (10, without labels)."""
    folder = tmp_path_factory.mktemp("files")
    write_rows(folder / "train.csv", 40, seed=0)
    write_rows(folder / "test.csv", 20, seed=1)
    write_rows(folder / "new.csv", 10, seed=2, label=None)
    return folder


@pytest.fixture(scope="session")
def small(tiny_model: Path, files: Path) -> list[str]:
    """Overrides that make a run small."""
    return [
        "model=hf",
        f"model.name={tiny_model}",
        "data=files",
        f"data.path={{train: {files / 'train.csv'}, test: {files / 'test.csv'}}}",
        "data.max_length=32",
        "data.batch_size=8",
        "trainer.max_epochs=2",
        "trainer.log_every_n_steps=2",
        "optimizer.lr=0.01",
    ]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """A function that runs a command in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "_user_packages", set())
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.delenv("LIGHTNING_PEFT_RUN_FOLDER", raising=False)

    def run_command(*arguments: str) -> Command:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["lightning-peft", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capfd.readouterr()
        return Command(int(stop.value.code or 0), out, err)

    return run_command


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the hub answer nothing, as on a machine without a network."""
    import huggingface_hub

    def refuse(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network in tests")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
