"""What prompts start from, and the settings that are refused."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_peft import inject
from lightning_peft.delta import NotMergeable
from lightning_peft.errors import AdapterError, ConfigError
from lightning_peft.methods.p_tuning import PTuning
from lightning_peft.methods.prompt_tuning import PromptTuning

Build = Callable[[str], Any]


def prompt_of(model: Any, **settings: Any) -> torch.Tensor:
    return inject(model, PromptTuning(**settings), head=False).parameters()[0].detach()


@pytest.mark.parametrize("name", ["llama", "bart", "bert"])
def test_starts_from_words_as_the_embedding_gives_them(name: str, build: Build) -> None:
    model = build(name).model
    core = model.get_encoder() if name == "bart" else model
    words = core.get_input_embeddings()
    every = words(torch.arange(len(words.weight))).detach()
    prompt = prompt_of(model, tokens=6)
    assert all((every == row).all(-1).any() for row in prompt)
    assert not (prompt == every[0]).all(-1).any()  # the padding
    given = prompt_of(build(name).model, tokens=5, init="text", init_ids=[7, 9])
    assert torch.equal(given, every[[7, 9, 7, 9, 7]])


def test_noise_is_as_large_as_words(build: Build) -> None:
    model = build("llama").model
    size = model.get_input_embeddings().weight.square().mean().sqrt()
    for method in (PromptTuning(tokens=30, init="random"), PTuning(tokens=30)):
        adapter = inject(model, method, head=False)
        (virtual,) = [d for _, _, d in adapter.deltas if list(d.parameters())]
        assert torch.isclose(virtual.vectors().square().mean().sqrt(), size, rtol=0.2)
        adapter.remove()


def test_a_text_is_read_once_and_kept_as_ids(minilm_dir: Path, minilm: Any) -> None:
    folder = str(minilm_dir)
    method = PromptTuning(tokens=4, init="text", init_text="good or bad?", tokenizer=folder)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_dir)
    assert tokenizer.convert_ids_to_tokens(list(method.init_ids)) == ["good", "or", "bad", "?"]
    gone = dataclasses.replace(method, tokenizer="nowhere")
    assert torch.equal(
        prompt_of(minilm.model, **dataclasses.asdict(gone)),
        minilm.model.get_input_embeddings().weight[list(method.init_ids)],
    )


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (PromptTuning, {"tokens": 0}, "`tokens` must be at least 1, but is 0"),
        (PromptTuning, {"layout": "x"}, "`layout` must be clean or peft, but is 'x'"),
        (PromptTuning, {"init": "x"}, "`init` must be vocabulary, random or text, but is 'x'"),
        (PromptTuning, {"init": "text"}, "exactly when `init_text` or `init_ids` give one"),
        (PromptTuning, {"init_ids": [3]}, "exactly when `init_text` or `init_ids` give one"),
        (PromptTuning, {"init": "text", "init_text": "a"}, "`tokenizer` must name .*name_or_path"),
        (PTuning, {"anchor_text": "a"}, "`tokenizer` must name .*`anchor_text`"),
        (PTuning, {"anchor_text": "a", "tokenizer": "/no"}, "'/no' cannot be loaded"),
        (PTuning, {"encoder": "x"}, "`encoder` must be mlp or lstm, but is 'x'"),
        (PTuning, {"hidden_size": 0}, "`hidden_size` must be at least 1, but is 0"),
        (PTuning, {"layers": 0}, "`layers` must be at least 1, but is 0"),
        (PTuning, {"dropout": 1}, r"`dropout` must lie in \[0, 1\), but is 1"),
    ],
)
def test_wrong_settings_are_refused(method: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method(**settings)


def test_ids_of_another_vocabulary_are_refused(build: Build) -> None:
    with pytest.raises(AdapterError, match=r"`init_ids` must lie in \[0, 64\), .* but 64 does not"):
        inject(build("llama").model, PromptTuning(init="text", init_ids=[64]))


def test_cannot_be_merged(build: Build) -> None:
    with pytest.raises(NotMergeable):
        inject(build("llama").model, PTuning(tokens=3)).merge()


@pytest.mark.parametrize("method", [PromptTuning(tokens=3), PTuning(tokens=3, encoder="lstm")])
def test_values_of_a_model_without_any_come_later(method: Any, build: Build) -> None:
    example = build("llama")
    model = example.model.to("meta")
    adapter = inject(model, method)
    assert all(parameter.is_meta for parameter in adapter.parameters())
    for _, _, delta in adapter.deltas:
        delta.to_empty(device="cpu")
        for module in delta.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in adapter.parameters())
