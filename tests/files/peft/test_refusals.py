"""Whatever is wrong with a folder is refused by name, and the model stays what it was, bitwise."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from lightning_peft import LoRA, inject, load_adapter
from lightning_peft.carrying.registry import adapters_of
from lightning_peft.errors import CheckpointError, PEFTError
from lightning_peft.files.adapter_folder import CONFIG, TENSORS, THEIR_CONFIG
from lightning_peft.methods import DoRA, SHiRA, VeRA
from tests.files.peft.exchange import example, perturb
from tests.files.test_adapter_folder import assert_untouched, bare

Build = Callable[[str], Any]
Tensors = dict[str, Tensor]

A = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
B = A.replace("lora_A", "lora_B")
HEAD = "base_model.model.classifier.weight"


def saved(build: Build, folder: Path, method: Any = None, own: bool = True) -> Path:
    """Write a perturbed adapter, with our sidecar or as peft has it."""
    adapter = inject(example("bert", build).model, method or LoRA(r=2, targets=["query"]))
    perturb(adapter.parameters())
    return adapter.save(folder) if own else adapter.export(folder)


def refused(build: Build, folder: Path, match: str, beside: bool = False, **settings: Any) -> None:
    """Assert that a folder is refused with a reason, and that nothing is left of the attempt.

    Args:
        build: the fixture.
        folder: what is loaded.
        match: the reason.
        beside: whether the model carries another adapter already.
        settings: of `load_adapter`.
    """
    model = example("bert", build).model
    other = inject(model, LoRA(r=3, targets="value"), "mine", head=False) if beside else None
    before = bare(model)
    with pytest.raises(PEFTError, match=match):
        load_adapter(model, folder, "loaded", **settings)
    after = bare(model)
    assert after[:2] == before[:2]
    assert after[2].keys() == before[2].keys()
    assert all(torch.equal(tensor, before[2][name]) for name, tensor in after[2].items())
    assert adapters_of(model) == ({} if other is None else {"mine": other})
    assert other is None or other.active


def rewrite(folder: Path, change: Callable[[Tensors], Any]) -> None:
    """Change the tensors, and the checksum with them, so that only the tensors are wrong."""
    tensors = load_file(folder / TENSORS)
    change(tensors)
    data = save(tensors, {"format": "pt"})
    (folder / TENSORS).write_bytes(data)
    if (folder / CONFIG).exists():
        edit(folder / CONFIG, sha256=hashlib.sha256(data).hexdigest())


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


WRONG_TENSORS: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "missing": (lambda t: t.pop(A), f"`{A}` is missing"),
    "no-head": (lambda t: t.pop(HEAD), f"`{HEAD}` is missing"),
    "unexpected": (
        lambda t: t.update({A + "2": t[A].clone()}), rf"`{A}2` is unexpected \(1 in all\)",
    ),
    "misnamed": (
        lambda t: t.update({A.replace("query", "key"): t.pop(A)}), "is unexpected.*Did you mean",
    ),
    "nan": (lambda t: t[B].view(-1)[3].fill_(torch.nan), f"`{B}` holds NaN"),
    "infinite": (lambda t: t[HEAD].view(-1)[0].fill_(torch.inf), f"`{HEAD}` holds NaN or inf"),
    "int8": (
        lambda t: t.update({A: t[A].to(torch.int8)}), f"`{A}` must be of a floating-.*int8",
    ),
    "float8": (
        lambda t: t.update({A: t[A].to(torch.float8_e4m3fn)}), f"`{A}` must be of .*float8",
    ),
    "transposed": (
        lambda t: t.update({A: t[A].T.contiguous()}), rf"`{A}` must have shape \(2, 32\)",
    ),
    "of-another-rank": (lambda t: t.update({A: torch.ones(3, 32)}), rf"`{A}` must have shape"),
    "a-path": (lambda t: t.update({"../../x": torch.ones(1)}), r"`../../x` is unexpected"),
    "an-absolute-path": (
        lambda t: t.update({"/etc/passwd": torch.ones(1)}), "`/etc/passwd` is unexpected",
    ),
    "another-base-beside": (
        lambda t: t.update({"base_model.model.bert.pooler.dense.bias": torch.ones(32)}),
        "pooler.dense.bias` (has other values than this base|is unexpected)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("own", [True, False], ids=["with-the-sidecar", "as-peft-has-it"])
@pytest.mark.parametrize("wrong", WRONG_TENSORS)
def test_wrong_tensors(wrong: str, own: bool, build: Build, tmp_path: Path) -> None:
    change, reason = WRONG_TENSORS[wrong]
    saved(build, tmp_path, own=own)
    rewrite(tmp_path, change)
    refused(build, tmp_path, reason, beside=own)


def test_a_flipped_bit(build: Build, tmp_path: Path) -> None:
    saved(build, tmp_path)
    data = bytearray((tmp_path / TENSORS).read_bytes())
    data[-9] ^= 4
    (tmp_path / TENSORS).write_bytes(data)
    refused(build, tmp_path, "is damaged: its SHA-256")
    refused(build, tmp_path, "is damaged: its SHA-256", ignore_fingerprint=True)


def test_a_configuration_that_was_changed_under_us(build: Build, tmp_path: Path) -> None:
    saved(build, tmp_path)
    edit(tmp_path / THEIR_CONFIG, lora_alpha=99)
    refused(build, tmp_path, "was changed since the adapter was saved")
    (tmp_path / CONFIG).unlink()
    assert load_adapter(example("bert", build).model, tmp_path).methods[0].alpha == 99


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("left", [0, 4, 40, 700, -1])
def test_a_truncated_file(left: int, own: bool, build: Build, tmp_path: Path) -> None:
    saved(build, tmp_path, own=own)
    data = (tmp_path / TENSORS).read_bytes()[:left]
    (tmp_path / TENSORS).write_bytes(data)
    if own:
        edit(tmp_path / CONFIG, sha256=hashlib.sha256(data).hexdigest())
    refused(build, tmp_path, "is no safetensors file")


def test_another_base_of_the_same_shape(build: Build, tmp_path: Path) -> None:
    saved(build, tmp_path)
    other = example("bert", build)
    with torch.no_grad():
        other.model.bert.embeddings.word_embeddings.weight.mul_(1.5)
    before = bare(other.model)
    with pytest.raises(CheckpointError, match="was trained on another base"):
        load_adapter(other.model, tmp_path)
    assert_untouched(other.model, before)
    adapter = load_adapter(other.model, tmp_path, ignore_fingerprint=True)
    assert adapter.num_parameters == 3 * 32 + 3 + 2 * 2 * 2 * 32


def test_a_base_of_another_shape_is_named(build: Build, tmp_path: Path) -> None:
    saved(build, tmp_path, own=False)
    edit(tmp_path / THEIR_CONFIG, base_model_name_or_path="org/base")
    rewrite(tmp_path, lambda t: t.update({B: torch.ones(64, 2)}))
    refused(build, tmp_path, "does not fit this model: .*It was trained on `org/base`")


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_adapter.bin"])
def test_a_pickle_is_not_opened(name: str, build: Build, tmp_path: Path) -> None:
    saved(build, tmp_path, own=False)
    (tmp_path / TENSORS).unlink()
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch bad'\ntR.")
    refused(build, tmp_path, f"`.*{name}` is a pickle.*is not opened: write it anew as `{TENSORS}`")


WRONG_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "no-type": ({"peft_type": None}, "`peft_type` in `.*` must be one of ADALORA, .*is None"),
    "unknown-type": ({"peft_type": "LORAX"}, "must be one of.*Did you mean `LORA`"),
    "a-path-for-a-type": ({"peft_type": "../x"}, "`peft_type`"),
    "a-list-for-a-type": ({"peft_type": ["LORA"]}, "`peft_type`"),
    "no-targets": ({"target_modules": None}, "`target_modules` in .* must name the modules"),
    "other-targets": ({"target_modules": ["quary"]}, "names no module.*Did you mean `query`"),
    "a-path-for-a-target": ({"target_modules": ["../../query"]}, "names no module"),
    "no-expression": ({"target_modules": "(query"}, r"`\(query` is no regular expression"),
    "more-targets": ({"target_modules": ["query", "key"]}, "key.lora_A.weight` is missing"),
    "fewer-targets": ({"target_modules": r".*\.0\..*query"}, "is unexpected"),
    "fewer-layers": ({"layers_to_transform": [0]}, "is unexpected"),
    "another-rank": ({"r": 4}, "must have shape"),
    "a-rank-pattern": ({"rank_pattern": {"query": 5}}, "must have shape"),
    "a-pattern-of-words": ({"rank_pattern": {"query": "x"}}, "must give whole numbers by pattern"),
    "a-pattern-of-halves": ({"rank_pattern": {"query": 2.5}}, "must give whole numbers"),
    "a-strength-that-is-none": ({"lora_alpha": float("nan")}, "`lora_alpha` in .* be finite"),
    "a-strength-without-end": ({"lora_alpha": float("inf")}, "`lora_alpha` in .* be finite"),
    "strengths-that-are-none": (
        {"alpha_pattern": {"query": float("nan")}}, "`alpha_pattern` in .* give finite numbers",
    ),
    "tied-modules": ({"ensure_weight_tying": True}, "`ensure_weight_tying` in .* must be off"),
    "a-list-for-a-layer": ({"layers_to_transform": [[0]]}, "A setting in .* cannot be honoured"),
    "a-pattern-of-zeros": ({"rank_pattern": {"query": 0}}, "`r` must be at least 1"),
    "a-rank-that-is-none": ({"r": "2"}, "`r` in .* must be of type int, but is '2'"),
    "a-rank-below-1": ({"r": 0}, "`r` must be at least 1"),
    "a-flag-for-a-rank": ({"r": True}, "`r` in"),
    "biases": ({"bias": "lora_only"}, "base_layer.bias` is missing"),
    "other-biases": ({"bias": "some"}, "`bias` in .* must be one of none, lora_only, all"),
    "a-bias-of-lora": ({"lora_bias": True}, "`lora_bias` in .* is not supported"),
    "magnitudes": ({"use_dora": True}, "lora_magnitude_vector` is missing"),
    "invoked": ({"alora_invocation_tokens": [1, 2]}, "`alora_invocation_tokens` in"),
    "replicated": ({"layer_replication": [[0, 2], [1, 2]]}, "`layer_replication` in"),
    "quantised-in-groups": ({"use_qalora": True}, "`use_qalora` in"),
    "blocks": ({"use_bdlora": {"x": 1}}, "`use_bdlora` in"),
    "arrows": ({"arrow_config": {"top_k": 3}}, "`arrow_config` in"),
    "of-later": ({"something_new": 0.5}, "`something_new` in .* is not supported"),
    "a-changed-base": ({"init_lora_weights": "loftq"}, "variant that we do not have"),
    "another-changed-base": ({"init_lora_weights": "corda"}, "variant that we do not have"),
    "more-modules": ({"modules_to_save": ["classifier", "pooler"]}, "pooler.dense.* is missing"),
    "modules-that-are-not": (
        {"modules_to_save": ["classifier", "lm_head"]}, "names `lm_head`, which the model lacks",
    ),
    "tokens": ({"trainable_token_indices": [3]}, "trainable_tokens_delta` is missing"),
    "no-tokens": ({"trainable_token_indices": ["a"]}, "must list ids"),
    "parameters-twice": ({"target_parameters": ["query.weight"]}, "not adapted themselves"),
    "no-parameters": ({"target_parameters": ["experts.weight"]}, "must name parameters"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_SETTINGS)
def test_wrong_settings(wrong: str, build: Build, tmp_path: Path) -> None:
    changes, reason = WRONG_SETTINGS[wrong]
    saved(build, tmp_path, own=False)
    edit(tmp_path / THEIR_CONFIG, **changes)
    refused(build, tmp_path, reason)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"', "\x80", "[" * 100_000])
def test_what_is_no_configuration(text: str, build: Build, tmp_path: Path) -> None:
    saved(build, tmp_path, own=False)
    (tmp_path / THEIR_CONFIG).write_text(text, encoding="latin-1")
    refused(build, tmp_path, THEIR_CONFIG)


def test_a_folder_that_has_neither_configuration(build: Build, tmp_path: Path) -> None:
    saved(build, tmp_path, own=False)
    (tmp_path / THEIR_CONFIG).unlink()
    refused(build, tmp_path, f"must hold `{TENSORS}` and `{CONFIG}`.*or peft's `{THEIR_CONFIG}`")


def test_random_matrices_of_another_seed(build: Build, tmp_path: Path) -> None:
    saved(build, tmp_path, VeRA(r=4, targets="query"), own=False)
    rewrite(tmp_path, lambda t: t.update({"base_model.vera_A": torch.ones(4, 32)}))
    refused(build, tmp_path, "`base_model.vera_A` has other values than its seed gives")


def test_places_of_another_seed(build: Build, tmp_path: Path) -> None:
    saved(build, tmp_path, SHiRA(r=1, targets="query"), own=False)
    edit(tmp_path / THEIR_CONFIG, random_seed=1)
    refused(build, tmp_path, "shira_indices` has other values")
    edit(tmp_path / THEIR_CONFIG, random_seed=None)
    refused(build, tmp_path, "`random_seed` in .* must be a number")


def test_magnitudes_that_are_rounded_numbers(build: Build, tmp_path: Path) -> None:
    saved(build, tmp_path, DoRA(r=2, targets="query"), own=False)
    key = A.replace("lora_A.weight", "lora_magnitude_vector")
    rewrite(tmp_path, lambda t: t.update({key: t[key].round().to(torch.int64)}))
    refused(build, tmp_path, f"`{key}` must be of a floating-point type")


def test_format_1_still_loads(build: Build, tmp_path: Path) -> None:
    ours, again = example("bert", build), example("bert", build)
    adapter = inject(ours.model, LoRA(r=2))
    perturb(adapter.parameters())
    adapter.save(tmp_path)
    state = {name: t.contiguous() for name, t in adapter.state_dict().items()}
    save_file(state, tmp_path / TENSORS, {"format": "pt"})
    (tmp_path / THEIR_CONFIG).unlink()
    config = json.loads((tmp_path / CONFIG).read_text())
    for key in ("keys", "replaced", "adapter_config_sha256"):
        del config[key]
    digest = hashlib.sha256((tmp_path / TENSORS).read_bytes()).hexdigest()
    (tmp_path / CONFIG).write_text(json.dumps(config | {"format": 1, "sha256": digest}))
    load_adapter(again.model, tmp_path)
    assert torch.equal(again.logits(), ours.logits())
