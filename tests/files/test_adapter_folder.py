"""An adapter on disk: whole, strict, safe."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import nn

from lightning_peft import Freeze, LoRA, Targets, inject, load_adapter, switch
from lightning_peft.carrying.registry import adapters_of
from lightning_peft.delta import SLOT
from lightning_peft.errors import AdapterError, CheckpointError, PEFTError
from lightning_peft.files.adapter_folder import CONFIG, TENSORS, THEIR_CONFIG
from lightning_peft.inspecting import inspect_path
from lightning_peft.methods import BitFit

Build = Callable[[str], Any]


def saved(
    build: Build, folder: Path, name: str = "bert", head: bool = True, **settings: Any
) -> Any:
    """Save a trained adapter and return its example."""
    example = build(name)
    adapter = inject(example.model, LoRA(r=2, **settings), head=head)
    example.train(adapter.parameters())
    adapter.save(folder)
    return example


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    for key, value in changes.items():
        if value is None:
            del config[key]
        else:
            config[key] = value
    (folder / CONFIG).write_text(json.dumps(config))


def rewrite(folder: Path, data: bytes) -> None:
    (folder / TENSORS).write_bytes(data)
    edit(folder, sha256=hashlib.sha256(data).hexdigest())


def bare(model: nn.Module) -> tuple[Any, ...]:
    flags = [p.requires_grad for p in model.parameters()]
    values = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    return flags, {name: type(m) for name, m in model.named_modules()}, values


def assert_untouched(model: nn.Module, before: tuple[Any, ...]) -> None:
    flags, types, values = bare(model)
    assert (flags, types) == before[:2]
    assert values.keys() == before[2].keys()
    assert all(torch.equal(tensor, before[2][key]) for key, tensor in values.items())
    assert adapters_of(model) == {}


def test_holds_two_files_a_person_can_read(build: Build, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "adapter"
    example = saved(build, folder, rank_pattern={"query": 4}, layers=[0])
    adapter = adapters_of(example.model)["default"]
    assert sorted(path.name for path in folder.iterdir()) == [THEIR_CONFIG, TENSORS, CONFIG]
    config = json.loads((folder / CONFIG).read_text())
    assert config["methods"][0]["_target_"] == "lightning_peft.methods.LoRA"
    assert config["methods"][0]["rank_pattern"] == {"query": 4}
    assert config["in_place"] == ["classifier.bias", "classifier.weight"]
    assert config["base"]["class"] == "BertForSequenceClassification"
    assert config["parameters"] == adapter.num_parameters
    tensors = load_file(folder / TENSORS)
    names = {n.replace(f".{SLOT}.default_lora", "") for n in adapter.state_dict()}
    theirs = {n.removeprefix("base_model.model.").removesuffix(".weight") for n in tensors}
    assert theirs == {name.removesuffix(".weight") for name in names}
    assert (folder / TENSORS).stat().st_size < adapter.num_bytes + 4096


@pytest.mark.parametrize(
    "method",
    [
        LoRA(targets=Targets("*.query", exclude="layer.0.*"), rslora=True),
        LoRA(bias="all", alpha_pattern={"query": 3.0}, layers=(-1,)),
        Freeze(layers=1, schedule={1: 2}),
        [LoRA(targets="query"), Freeze(layers=0, patterns=["*.bias"])],
    ],
    ids=["targets", "patterns", "schedule", "two"],
)
def test_settings_come_back(method: Any, build: Build, tmp_path: Path) -> None:
    example, other = build("bert"), build("bert")
    adapter = inject(example.model, method)
    example.train(adapter.parameters())
    loaded = load_adapter(other.model, adapter.save(tmp_path))
    assert torch.equal(other.logits(), example.logits())
    methods = method if isinstance(method, list) else [method]
    assert len(loaded.methods) == len(methods)
    assert set(loaded.named_parameters()) == set(adapter.named_parameters())
    example.train(adapter.parameters())
    other.train(loaded.parameters())
    assert torch.equal(other.logits(), example.logits())


@pytest.mark.parametrize("name", ["gpt2", "cnn", "t5", "encoder_with_head"])
def test_logits_come_back_on_other_models(name: str, build: Build, tmp_path: Path) -> None:
    example, other = saved(build, tmp_path, name), build(name)
    load_adapter(other.model, tmp_path)
    assert torch.equal(other.logits(), example.logits())


def test_under_another_name_beside_another_adapter(build: Build, tmp_path: Path) -> None:
    example, other = saved(build, tmp_path), build("bert")
    inject(other.model, LoRA(r=3), "mine", head=False)
    loaded = load_adapter(other.model, tmp_path, name="theirs")
    assert (loaded.name, sorted(adapters_of(other.model))) == ("theirs", ["mine", "theirs"])
    assert all(f"{SLOT}.theirs_lora." in n or n in loaded.in_place for n in loaded.state_dict())
    assert torch.equal(other.logits(), example.logits())


@pytest.mark.parametrize("method", [LoRA(r=2), BitFit()], ids=["a-head", "biases"])
def test_beside_one_that_trains_in_place(method: Any, build: Build, tmp_path: Path) -> None:
    example = saved(build, tmp_path, head=False)
    expected, other = example.logits(), build("bert")
    first = inject(other.model, method, "first")
    other.train(first.parameters())
    load_adapter(other.model, tmp_path, "second")
    assert torch.equal(other.logits(), expected)


def test_a_whole_module_has_the_base_where_another_trains_it(build: Build, tmp_path: Path) -> None:
    example, base = build("bert"), build("bert")
    inject(example.model, LoRA(r=2), "a", head=False, train="classifier.weight")
    b = inject(example.model, LoRA(r=2), "b", head=False, train="classifier.bias")
    example.train(b.parameters())
    switch(example.model, ["a", "b"])
    adapters_of(example.model)["a"].save(tmp_path)
    bias = load_file(tmp_path / TENSORS)["base_model.model.classifier.bias"]
    assert torch.equal(bias, base.model.classifier.bias)
    load_adapter(base.model, tmp_path)


def test_a_name_within_a_name_is_not_renamed(build: Build, tmp_path: Path) -> None:
    example, other = build("mlp"), build("mlp")
    adapter = inject(example.model, LoRA(targets="fc1"), "a")
    load_adapter(other.model, adapter.save(tmp_path), name="a_b")
    again = adapters_of(other.model)["a_b"].save(tmp_path / "again")
    third = build("mlp")
    assert load_adapter(third.model, again).name == "a_b"


def test_a_head_that_shares_the_end_of_another_name(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Module()
        model.head = nn.Linear(2, 2)
        model.aux = nn.Module()
        model.aux.head = nn.Linear(2, 2)
        return model

    adapter = inject(make(), LoRA(targets="aux.head"), train=r"re:head\.weight", head=False)
    loaded = load_adapter(make(), adapter.save(tmp_path))
    assert loaded.in_place == ["head.weight"]


def test_a_half_precision_model_loads_what_a_full_one_saved(build: Build, tmp_path: Path) -> None:
    example, other = saved(build, tmp_path), build("bert")
    adapter = load_adapter(other.model.to(torch.bfloat16), tmp_path)
    assert {p.dtype for n, p in adapter.named_parameters().items() if SLOT in n} == {torch.float32}
    torch.testing.assert_close(other.logits().float(), example.logits(), rtol=0.1, atol=0.1)


def test_another_base_is_refused(build: Build, tmp_path: Path) -> None:
    saved(build, tmp_path)
    for name in ("roberta", "bert"):
        model = build(name).model
        with torch.no_grad():
            model.get_submodule(f"{name}.embeddings.word_embeddings").weight.mul_(1.5)
        before = bare(model)
        with pytest.raises(CheckpointError, match="was trained on another base"):
            load_adapter(model, tmp_path)
        assert_untouched(model, before)


def test_a_second_time_is_refused(build: Build, tmp_path: Path) -> None:
    example = saved(build, tmp_path)
    before = example.logits()
    with pytest.raises(PEFTError, match="already carries"):
        load_adapter(example.model, tmp_path)
    assert torch.equal(example.logits(), before)


@pytest.mark.parametrize("lost", [TENSORS, CONFIG])
def test_a_missing_file_is_named(lost: str, build: Build, tmp_path: Path) -> None:
    saved(build, tmp_path)
    (tmp_path / lost).unlink()
    (tmp_path / THEIR_CONFIG).unlink()
    with pytest.raises(CheckpointError, match=f"must hold `{TENSORS}`.*{lost}"):
        load_adapter(build("bert").model, tmp_path)


def test_a_flipped_bit_is_noticed(build: Build, tmp_path: Path) -> None:
    saved(build, tmp_path)
    data = bytearray((tmp_path / TENSORS).read_bytes())
    data[-5] ^= 1
    (tmp_path / TENSORS).write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_adapter(build("bert").model, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 3}, "must have `format` 1 or 2"),
        ({"format": None}, "must have `format` 1 or 2"),
        ({"sha256": None}, "lacks `sha256`"),
        ({"methods": None}, "lacks `methods`"),
        ({"fingerprint": None}, "lacks `fingerprint`"),
        ({"in_place": None}, "lacks `in_place`"),
        ({"name": None}, "lacks `name`"),
        ({"methods": [{"_target_": "os.system", "command": "true"}]}, "os.system"),
        ({"methods": [{"_target_": "lightning_peft.Targets"}]}, "Method"),
        ({"methods": [{"_target_": "lightning_peft.LoRA", "rank": 3}]}, "rank"),
        ({"methods": [{"_target_": "lightning_peft.LoRA", "targets": "nothing"}]}, "nothing"),
        ({"methods": [{"_target_": "lightning_peft.LoRA", "r": 10**12}]}, "hold 1"),
        (
            {"methods": [{"_target_": "lightning_peft.LoRA", "rank_pattern": {"query": 10**9}}]},
            "`rank_pattern` in",
        ),
        ({"in_place": ["nothing"]}, "nothing"),
        ({"in_place": []}, "unexpected"),
        ({"in_place": ["classifier.bias"]}, "`base_model.model.classifier.weight` has other"),
        ({"name": "a b"}, "must be letters"),
    ],
)
def test_a_config_that_was_tampered_with_is_refused(
    changes: dict[str, Any], message: str, build: Build, tmp_path: Path
) -> None:
    saved(build, tmp_path)
    edit(tmp_path, **changes)
    model = build("bert").model
    before = bare(model)
    with pytest.raises(PEFTError) as raised:
        load_adapter(model, tmp_path)
    assert message in str(raised.value)
    assert_untouched(model, before)


WRONG_KINDS: list[tuple[str, Any]] = [
    *(("name", value) for value in (None, 3, "", "../x", "_-")),
    *(("methods", value) for value in (None, [], {}, "LoRA", [3])),
    *(("in_place", value) for value in (None, 3, [3], "classifier.weight")),
    *(("fingerprint", value) for value in (None, {}, "x", {"sha256": 3, "tensors": 3})),
    *(("replaced", value) for value in (None, 3, [[1]])),
    *((key, [3]) for key in ("format", "sha256", "keys", "base", "parameters", "lightning_peft")),
]


@pytest.mark.parametrize(("key", "value"), WRONG_KINDS)
def test_a_key_of_another_kind_is_named(key: str, value: Any, build: Build, tmp_path: Path) -> None:
    inject(build("bert").model, LoRA(r=2)).save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text()) | {key: value}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    model = build("bert").model
    before = bare(model)
    with pytest.raises(CheckpointError, match=f"(?s){tmp_path}.*`{key}`|`{key}`.*{tmp_path}"):
        load_adapter(model, tmp_path)
    with pytest.raises(CheckpointError, match=f"`{key}`"):
        inspect_path(tmp_path)
    assert_untouched(model, before)


def test_a_rank_larger_than_all_tensors_of_pefts_is_refused(build: Build, tmp_path: Path) -> None:
    inject(build("bert").model, LoRA(r=2)).export(tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / THEIR_CONFIG).read_text())
    (tmp_path / "peft" / THEIR_CONFIG).write_text(json.dumps(config | {"r": 10**12}))
    model = build("bert").model
    before = bare(model)
    with pytest.raises(CheckpointError, match=r"`r` in .* is 1,000,000,000,000"):
        load_adapter(model, tmp_path / "peft")
    assert_untouched(model, before)


def test_what_is_no_json_and_no_safetensors_is_refused(build: Build, tmp_path: Path) -> None:
    saved(build, tmp_path)
    rewrite(tmp_path, b"\x80\x05pickle")
    with pytest.raises(CheckpointError, match=f"`.*{TENSORS}` is no safetensors file"):
        load_adapter(build("bert").model, tmp_path)
    for text in ("{", "[]", '"format"'):
        (tmp_path / CONFIG).write_text(text)
        with pytest.raises(CheckpointError):
            load_adapter(build("bert").model, tmp_path)


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "nan", "dtype"])
def test_tensors_that_do_not_fit_are_refused(change: str, build: Build, tmp_path: Path) -> None:
    saved(build, tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    first = next(name for name in tensors if name.endswith("lora_A.weight"))
    if change == "missing":
        del tensors[first]
    else:
        tensors[first if change != "extra" else f"{first}_more"] = {
            "extra": torch.ones(1),
            "shape": torch.ones(3, 32),
            "nan": torch.full_like(tensors[first], torch.nan),
            "dtype": torch.ones(tensors[first].shape, dtype=torch.int32),
        }[change]
    rewrite(tmp_path, save(tensors, {"format": "pt"}))
    model = build("bert").model
    before = bare(model)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        load_adapter(model, tmp_path)
    assert_untouched(model, before)


def test_nan_is_not_saved_and_the_last_good_files_stay(build: Build, tmp_path: Path) -> None:
    example = saved(build, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    adapter = adapters_of(example.model)["default"]
    with torch.no_grad():
        adapter.parameters()[0].fill_(torch.nan)
    with pytest.raises(CheckpointError, match=r"was not saved: .* holds NaN"):
        adapter.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_written_is_named(build: Build, tmp_path: Path) -> None:
    adapter = inject(build("mlp").model, LoRA())
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be written to `.*file/adapter`"):
        adapter.save(tmp_path / "file" / "adapter")


def test_a_full_disk_leaves_the_last_good_files(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = saved(build, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    example.train(adapters_of(example.model)["default"].parameters())

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        adapters_of(example.model)["default"].save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_is_not_saved_while_disabled(build: Build, tmp_path: Path) -> None:
    adapter = inject(build("bert").model, LoRA())
    with adapter.disabled(), pytest.raises(AdapterError, match="disabled"):
        adapter.save(tmp_path)
    assert not list(tmp_path.iterdir())
