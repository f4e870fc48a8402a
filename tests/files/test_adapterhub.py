"""Bottleneck adapters in AdapterHub's format: the same outputs, and the same tensors back.

The folders in `tests/oracles/adapterhub` were written by adapters 1.3; see the script there.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_peft import BottleneckAdapter, LoRA, inject, load_adapter
from lightning_peft.adapter import adapters_of
from lightning_peft.errors import AdapterError, CheckpointError, PEFTError
from lightning_peft.files.adapterhub import CONFIG, HEAD, HEAD_CONFIG, TENSORS
from tests.files.peft.exchange import perturb
from tests.methods.adapters_oracle import TINY
from tests.oracles.filling import fill

FOLDER = Path(__file__).parents[1] / "oracles" / "adapterhub"
IDS = torch.arange(3, 24).reshape(3, 7)
CASES: dict[str, dict[str, Any]] = {
    "bert-houlsby": {"placement": "houlsby", "activation": "silu", "size": 4},
    "bert-parallel": {"placement": "parallel", "scaling": "learned", "size": 4},
    "llama-plain": {"targets": (r"re:model\.layers\.1\.mlp\.down_proj",), "size": 4},
    "gpt2-gated": {"placement": "houlsby", "gating": "sequence", "scaling": 2.0},
    "t5-houlsby": {"placement": "pfeiffer", "activation": "silu"},
    "t5-cross": {"placement": "houlsby", "activation": "silu"},
}
Build = Callable[[str], Any]


def base(kind: str) -> Any:
    import transformers

    gpt2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
    t5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    made: dict[str, tuple[str, dict[str, Any]]] = {
        "bert": ("BertForSequenceClassification", TINY | {"num_labels": 3}),
        "llama": ("LlamaForCausalLM", TINY | {"num_key_value_heads": 2, "eos_token_id": 2}),
        "gpt2": ("GPT2LMHeadModel", gpt2),
        "t5": ("T5ForConditionalGeneration", t5 | {"decoder_start_token_id": 0}),
    }
    cls, settings = made[kind]
    model_class = getattr(transformers, cls)
    model = model_class(model_class.config_class(**settings)).eval()
    fill(dict(model.named_parameters()))
    return model


def logits(model: Any, case: str) -> torch.Tensor:
    decoder = {"decoder_input_ids": IDS[:, :4]} if case.startswith("t5") else {}
    with torch.no_grad():
        output: torch.Tensor = model(input_ids=IDS, **decoder).logits
    return output


def model_of(case: str) -> Any:
    return base(case.partition("-")[0])


@pytest.mark.parametrize("case", CASES)
def test_a_folder_computes_what_the_library_does_and_goes_back(case: str, tmp_path: Path) -> None:
    model = model_of(case)
    adapter = load_adapter(model, FOLDER / case)
    expected = load_file(FOLDER / case / "logits.safetensors")["logits"]
    torch.testing.assert_close(logits(model, case), expected, rtol=1e-4, atol=1e-5)
    for name, value in CASES[case].items():
        assert getattr(adapter.methods[0], name) == value, name
    adapter.export(tmp_path, "adapterhub")
    for name in (TENSORS, HEAD):
        if (FOLDER / case / name).exists():
            theirs, ours = load_file(FOLDER / case / name), load_file(tmp_path / name)
            assert theirs.keys() == ours.keys()
            assert all(torch.equal(tensor, ours[key]) for key, tensor in theirs.items())
    theirs, ours = (json.loads((f / CONFIG).read_text()) for f in (FOLDER / case, tmp_path))
    compared = ours["config"].keys() - {"reduction_factor"}
    assert {k: ours["config"][k] for k in compared} == {k: theirs["config"][k] for k in compared}
    assert 32 // ours["config"]["reduction_factor"] == 4
    assert ours.keys() == theirs.keys()


def test_it_trains_on_and_is_saved_as_ours(tmp_path: Path) -> None:
    model = model_of("bert-houlsby")
    adapter = load_adapter(model, FOLDER / "bert-houlsby")
    assert adapter.in_place == ["classifier.bias", "classifier.weight"]
    model(input_ids=IDS).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters())
    adapter.save(tmp_path)
    other = model_of("bert-houlsby")
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other, "bert"), logits(model, "bert"))


def test_the_names_of_places_that_have_changed_since(build: Build, tmp_path: Path) -> None:
    example, other = build("vit"), build("vit")
    adapter = inject(example.model, BottleneckAdapter(placement="houlsby", size=5), "mine")
    perturb(adapter.parameters())
    adapter.export(tmp_path, "adapterhub")
    keys = load_file(tmp_path / TENSORS).keys()
    assert {key.partition(".adapters.mine.")[0] for key in keys} == {
        f"vit.encoder.layer.{i}.{place}"
        for i in (0, 1)
        for place in ("attention_adapters", "output.output_adapters")
    }
    assert 32 // json.loads((tmp_path / CONFIG).read_text())["config"]["reduction_factor"] == 5
    load_adapter(other.model, tmp_path)
    assert torch.equal(other.logits(), example.logits())


def test_a_headless_model_takes_what_a_model_with_a_head_left(build: Build, tmp_path: Path) -> None:
    example = build("bert")
    adapter = inject(example.model, BottleneckAdapter(), head=False)
    perturb(adapter.parameters())
    adapter.export(tmp_path, "adapterhub")
    assert sorted(path.name for path in tmp_path.iterdir()) == [TENSORS, CONFIG]
    other = build("bert_base")
    other.model.load_state_dict(example.model.bert.state_dict(), strict=False)
    load_adapter(other.model, tmp_path)
    with torch.no_grad():
        ours = example.model.bert(**example.inputs).last_hidden_state
    torch.testing.assert_close(other.logits(), ours)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"original_ln_before": True}, "normalises by weights of the base before the adapter"),
        ({"ln_after": True}, "normalises behind the adapter, which ours do not: it must be False"),
        ({"phm_layer": True}, "Compacter"),
        ({"inv_adapter": "nice"}, "invertible"),
        ({"non_linearity": "gelu_new"}, "must be one of swish"),
        ({"scaling": "channel"}, "must be a number or 'learned'"),
        ({"residual_before_ln": "post_add"}, "must be true or false"),
        ({"new_feature": 3}, "`new_feature` .* is not supported"),
        ({"is_parallel": True}, "every feed-forward"),
    ],
)
def test_what_is_not_ours_is_refused(changes: Any, reason: str, tmp_path: Path) -> None:
    shutil.copytree(FOLDER / "bert-houlsby", tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    config["config"] |= changes
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config))
    assert_refused(tmp_path / "a", reason)


def assert_refused(folder: Path, reason: str) -> None:
    model = model_of("bert")
    before = logits(model, "bert")
    with pytest.raises(PEFTError, match=reason):
        load_adapter(model, folder)
    assert torch.equal(logits(model, "bert"), before)
    assert adapters_of(model) == {}


def test_the_librarys_default_is_refused() -> None:
    assert_refused(FOLDER / "bert-default", "`original_ln_before` .* but is True instead")


@pytest.mark.parametrize(
    ("file", "edit", "reason"),
    [
        (TENSORS, lambda t: {k: v for k, v in t.items() if "1.output" not in k}, "is missing"),
        (TENSORS, lambda t: {k: v[:3] for k, v in t.items()}, "must have shape"),
        (TENSORS, lambda t: {k: v / 0 for k, v in t.items()}, "NaN or infinite"),
        (TENSORS, lambda t: {k.replace("layer.1", "layer.7"): v for k, v in t.items()}, "layer.7"),
        (TENSORS, lambda t: {k.replace("_up", "_sideways"): v for k, v in t.items()}, "unexpected"),
        (HEAD, lambda t: {"pooler.weight": t["classifier.weight"]}, "`pooler.weight`"),
        (HEAD, lambda t: {"classifier.weight": t["classifier.weight"][:1]}, "must have shape"),
    ],
)
def test_faults_of_tensors_are_named(file: str, edit: Any, reason: str, tmp_path: Path) -> None:
    shutil.copytree(FOLDER / "bert-houlsby", tmp_path / "a")
    edited = {k: t.contiguous() for k, t in edit(load_file(tmp_path / "a" / file)).items()}
    save_file(edited, tmp_path / "a" / file)
    assert_refused(tmp_path / "a", reason)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    shutil.copy(FOLDER / "bert-houlsby" / CONFIG, tmp_path)
    (tmp_path / "pytorch_adapter.bin").write_bytes(b"pickle")
    assert_refused(tmp_path, "pytorch_adapter.bin` is a pickle")


def test_another_architecture_is_refused() -> None:
    with pytest.raises(CheckpointError, match="which LlamaForCausalLM does not have"):
        load_adapter(model_of("llama"), FOLDER / "bert-houlsby")


@pytest.mark.parametrize(
    ("method", "name", "reason"),
    [
        (BottleneckAdapter(placement="parallel"), "llama", "before the normalisation"),
        (BottleneckAdapter(layer_norm=True), "bert", "layer_norm=True"),
        (BottleneckAdapter(gating="token"), "bert", "gating='token'"),
        (BottleneckAdapter(targets="intermediate.dense"), "bert", "no adapter behind"),
        (LoRA(), "bert", "bottleneck adapters alone, and this adapter has lora"),
        ([BottleneckAdapter(), LoRA()], "bert", re.escape("export with part='bottleneck'")),
        (BottleneckAdapter(), "swin", "known for .*, but not for swin"),
    ],
)
def test_what_the_library_cannot_hold_is_not_written(
    method: Any, name: str, reason: str, build: Build, tmp_path: Path
) -> None:
    adapter = inject(build(name).model, method)
    with pytest.raises(AdapterError, match=reason):
        adapter.export(tmp_path, "adapterhub")
    assert list(tmp_path.iterdir()) == []


def test_one_part_and_an_earlier_head(build: Build, tmp_path: Path) -> None:
    inject(build("bert").model, BottleneckAdapter()).export(tmp_path, "adapterhub")
    assert (tmp_path / HEAD_CONFIG).exists()
    both = inject(build("bert").model, [LoRA(r=2), BottleneckAdapter()], head=False)
    both.export(tmp_path, "adapterhub", part="bottleneck")
    assert sorted(path.name for path in tmp_path.iterdir()) == [TENSORS, CONFIG]
    train = inject(build("bert").model, BottleneckAdapter(), train="embeddings.LayerNorm")
    with pytest.raises(AdapterError, match=r"no place for `bert.embeddings"):
        train.export(tmp_path, "adapterhub")


@pytest.mark.parametrize("later", ["save", "peft", "adapterhub"])
@pytest.mark.parametrize("earlier", ["save", "peft", "adapterhub"])
def test_nothing_is_left_of_another_format(
    earlier: str, later: str, build: Build, tmp_path: Path
) -> None:
    def written(form: str, number: int) -> torch.Tensor:
        example = build("bert")
        method = BottleneckAdapter() if form == "adapterhub" else LoRA(r=2)
        adapter = inject(example.model, method, f"a{number}")
        for _ in range(number):
            perturb(adapter.parameters())
        adapter.save(tmp_path) if form == "save" else adapter.export(tmp_path, form)
        return example.logits()

    written(earlier, 1)
    expected = written(later, 2)
    example = build("bert")
    load_adapter(example.model, tmp_path)
    assert torch.allclose(example.logits(), expected, atol=1e-6)
