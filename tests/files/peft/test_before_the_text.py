"""Virtual tokens and prefixes in peft's format: the same outputs there and here, both ways."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_peft import LoRA, inject, load_adapter
from lightning_peft.adapter import adapters_of
from lightning_peft.errors import AdapterError, PEFTError
from lightning_peft.files.adapter_folder import CONFIG, TENSORS, THEIR_CONFIG
from lightning_peft.methods import PrefixTuning, PromptTuning, PTuning, PTuningV2
from tests.conftest import BERT, TINY
from tests.files.peft.exchange import QUIET, perturb

peft = pytest.importorskip("peft", reason="peft is not installed: run `pip install '.[dev]'`")

Build = Callable[[str], Any]

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore::FutureWarning")]

N = 3
TASKS = {
    "bert": "SEQ_CLS",
    "roberta": "SEQ_CLS",
    "llama_classifier": "SEQ_CLS",
    "gpt2_classifier": "SEQ_CLS",
    "roberta_tokens": "TOKEN_CLS",
    "bert_answers": "QUESTION_ANS",
    "llama_answers": "QUESTION_ANS",
    "bert_base": "FEATURE_EXTRACTION",
    "llama": "CAUSAL_LM",
    "gpt2": "CAUSAL_LM",
    "bloom": "CAUSAL_LM",
    "gemma3": "CAUSAL_LM",
    "t5": "SEQ_2_SEQ_LM",
    "t5_odd": "SEQ_2_SEQ_LM",
    "bart": "SEQ_2_SEQ_LM",
}
OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "roberta_tokens": ("RobertaForTokenClassification", BERT | {"max_position_embeddings": 42}),
    "bert_answers": ("BertForQuestionAnswering", BERT | {"num_labels": 2}),
    "llama_answers": ("LlamaForQuestionAnswering", TINY | {"num_key_value_heads": 2}),
    "bloom": ("BloomForCausalLM", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "gemma3": (
        "Gemma3ForCausalLM",
        TINY | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}
        | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "t5_odd": (
        "T5ForConditionalGeneration",
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}
        | {"decoder_start_token_id": 0, "dropout_rate": 0.0},
    ),
}  # fmt: skip
CONFIGS: dict[str, Callable[..., Any]] = {
    "prompt": peft.PromptTuningConfig,
    "mlp": lambda **kw: peft.PromptEncoderConfig(encoder_hidden_size=16, **kw),
    "lstm": lambda **kw: peft.PromptEncoderConfig(
        encoder_hidden_size=16, encoder_reparameterization_type="LSTM", **kw
    ),
    "prefix": peft.PrefixTuningConfig,
    "projected": lambda **kw: peft.PrefixTuningConfig(
        prefix_projection=True, encoder_hidden_size=16, **kw
    ),
}
OURS: dict[str, Callable[..., Any]] = {
    "prompt": PromptTuning,
    "mlp": lambda **kw: PTuning(hidden_size=16, anchor_ids=(5, 9), **kw),
    "lstm": lambda **kw: PTuning(encoder="lstm", **kw),
    "prefix": PrefixTuning,
    "projected": lambda **kw: PrefixTuning(bottleneck=8, **kw),
}
FAST = [
    *((kind, name) for kind in CONFIGS for name in ("bert", "llama")),
    *(("prompt", name) for name in ("gpt2_classifier", "roberta_tokens", "bert_answers", "t5")),
    *(("prefix", name) for name in ("roberta", "bert_base", "gpt2", "bloom", "t5", "t5_odd")),
]
CELLS = [
    pytest.param(kind, name, marks=() if (kind, name) in FAST else pytest.mark.slow)
    for kind in CONFIGS
    for name in TASKS
]


def base(name: str, build: Build) -> Any:
    """Return a model in eval mode, the same in every call."""
    if name not in OWN:
        return build(name).model
    import transformers

    cls, settings = OWN[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, cls)(getattr(transformers, cls).config_class(**settings))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def inputs(name: str, padded: bool = False) -> dict[str, Tensor]:
    ids = torch.tensor([[5, 9, 33, 12, 7, 41, 8], [11, 3, 60, 5, 28, 14, 9]])
    mask = torch.ones_like(ids)
    if padded:
        mask[1, -2:] = 0
    decoder = {"decoder_input_ids": ids[:, :4]} if TASKS[name] == "SEQ_2_SEQ_LM" else {}
    return {"input_ids": ids, "attention_mask": mask, **decoder}


@torch.no_grad()
def assert_same(own: nn.Module, theirs: nn.Module, name: str, tokens: int = N) -> None:
    """Compare what both give; peft leaves the outputs of virtual tokens in front."""
    for padded in (False, True):
        batch = inputs(name, padded)
        for ours, other in zip(*(m(**batch).to_tuple()[:2] for m in (own, theirs)), strict=True):
            if not isinstance(ours, Tensor):
                continue  # the cache
            longer = other.dim() > 1 and other.shape[1] == ours.shape[1] + tokens
            cut = other[:, tokens:] if longer else other
            real = batch["attention_mask"].bool()
            if cut.shape[:2] != real.shape:
                real = torch.ones_like(cut, dtype=torch.bool)
            torch.testing.assert_close(ours[real], cut[real], rtol=1e-5, atol=1e-5)


def written_by_peft(kind: str, name: str, build: Build, folder: Path, **settings: Any) -> Any:
    """Return a model of peft's that saved itself, or skip where peft cannot run it."""
    config = CONFIGS[kind](task_type=TASKS[name], num_virtual_tokens=N, **settings)
    model = peft.get_peft_model(base(name, build), config).eval()
    perturb([p for p in model.parameters() if p.requires_grad])
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(("kind", "name"), CELLS)
def test_what_peft_wrote_computes_the_same_and_trains_on(
    kind: str, name: str, build: Build, tmp_path: Path
) -> None:
    theirs, own = written_by_peft(kind, name, build, tmp_path / "theirs"), base(name, build)
    adapter = load_adapter(own, tmp_path / "theirs")
    assert_same(own, theirs, name)
    (method,) = adapter.methods
    expected = PrefixTuning if kind in ("prefix", "projected") else PromptTuning
    assert type(method) is expected
    assert (method.tokens, method.layout) == (N, "peft")
    with torch.no_grad():
        before = own(**inputs(name))[0]
    own(**inputs(name))[0].square().mean().backward()
    graded = {n: p for n, p in adapter.named_parameters().items() if p.grad is not None}
    assert all(p.grad.abs().max() > 0 for n, p in graded.items() if "lightning_peft" in n)
    torch.optim.SGD(adapter.parameters(), lr=1.0).step()
    adapter.save(tmp_path / "ours")
    again, other = base(name, build), base(name, build)
    load_adapter(again, tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(again(**inputs(name))[0], own(**inputs(name))[0])
        assert not torch.equal(again(**inputs(name))[0], before)
    assert_same(own, peft.PeftModel.from_pretrained(other, tmp_path / "ours").eval(), name)


@pytest.mark.parametrize(("kind", "name"), CELLS)
def test_peft_computes_what_we_export(kind: str, name: str, build: Build, tmp_path: Path) -> None:
    own = base(name, build)
    adapter = inject(own, OURS[kind](tokens=N, layout="peft"))
    perturb(adapter.parameters())
    adapter.export(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [THEIR_CONFIG, TENSORS]
    config = json.loads((tmp_path / THEIR_CONFIG).read_text())
    assert config["task_type"] == TASKS[name]
    theirs = peft.PeftModel.from_pretrained(base(name, build), tmp_path).eval()
    assert_same(own, theirs, name, config["num_virtual_tokens"])
    again = base(name, build)
    load_adapter(again, tmp_path)
    with torch.no_grad():
        ours, other = own(**inputs(name))[0], again(**inputs(name))[0]
    torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["mlp", "lstm", "projected"])
def test_a_save_keeps_what_makes_the_vectors(kind: str, build: Build, tmp_path: Path) -> None:
    own, again = base("llama", build), base("llama", build)
    adapter = inject(own, OURS[kind](tokens=N, layout="peft"))
    perturb(adapter.parameters())
    adapter.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [TENSORS, CONFIG]
    assert load_file(tmp_path / TENSORS).keys() == adapter.state_dict().keys()
    assert load_adapter(again, tmp_path).methods == adapter.methods


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart", "llama_classifier"])
def test_where_a_clean_prompt_is_the_same_peft_gets_it(
    name: str, build: Build, tmp_path: Path
) -> None:
    own = base(name, build)
    adapter = inject(own, PromptTuning(tokens=N))
    perturb(adapter.parameters())
    adapter.save(tmp_path)
    assert (tmp_path / THEIR_CONFIG).exists()
    assert_same(own, peft.PeftModel.from_pretrained(base(name, build), tmp_path).eval(), name)


@pytest.mark.parametrize(
    ("method", "name", "reason"),
    [
        (PromptTuning(tokens=N, layout="clean"), "bert", r"before the first.*layout='peft'"),
        (PTuning(tokens=N, layout="clean"), "roberta_tokens", r"before the first.*layout='peft'"),
        (PrefixTuning(tokens=N), "llama", r"positions of the text move on by 3.*layout='peft'"),
        (PrefixTuning(tokens=N), "gpt2", r"positions of the text move on by 3.*layout='peft'"),
        (PTuningV2(tokens=N), "bert", r"positions of the text move on by 3.*layout='peft'"),
        (PrefixTuning(tokens=N), "t5", r"self-attention of 2 layers, here are 6"),
        (PrefixTuning(tokens=N, gating="token"), "llama", "no gate"),
        (PrefixTuning(tokens=N), "distilbert", "into the cache: .*takes no cache"),
        (PromptTuning(tokens=N), "vit", "among words only"),
    ],
)
def test_where_peft_would_compute_something_else_it_gets_nothing(
    method: Any, name: str, reason: str, build: Build, tmp_path: Path
) -> None:
    own = base(name, build)
    adapter = inject(own, method)
    before = {key: tensor.clone() for key, tensor in own.state_dict().items()}
    modes = [module.training for module in own.modules()]
    with pytest.raises(AdapterError, match=reason):
        adapter.export(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert modes == [module.training for module in own.modules()]
    assert all(torch.equal(tensor, before[key]) for key, tensor in own.state_dict().items())
    adapter.save(tmp_path)
    assert not (tmp_path / THEIR_CONFIG).exists()
    load_adapter(base(name, build), tmp_path)


@pytest.mark.parametrize("name", ["bert", "llama_classifier", "roberta_tokens", "bert_answers"])
def test_a_head_that_is_not_trained_is_there_for_peft(
    name: str, build: Build, tmp_path: Path
) -> None:
    own = base(name, build)
    adapter = inject(own, PromptTuning(tokens=N, layout="peft"), head=False)
    perturb(adapter.parameters())
    adapter.save(tmp_path)
    assert_same(own, peft.PeftModel.from_pretrained(base(name, build), tmp_path).eval(), name)
    again = base(name, build)
    assert load_adapter(again, tmp_path).in_place == []
    (tmp_path / CONFIG).unlink()
    load_adapter(base(name, build), tmp_path)


def test_what_reads_all_tokens_cannot_be_as_in_peft(build: Build, tmp_path: Path) -> None:
    import transformers

    settings = TINY | {"cls_token_id": 1, "sep_token_id": 2, "classifier_pooling": "mean"}
    config = transformers.ModernBertConfig(**settings, num_labels=3)
    model = transformers.ModernBertForSequenceClassification(config).eval()
    wanted = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=N)
    theirs = peft.get_peft_model(copy.deepcopy(model), wanted)
    perturb([p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(tmp_path)
    with pytest.raises(PEFTError, match="would give something else"):
        load_adapter(model, tmp_path)
    assert adapters_of(model) == {}


def test_one_part_of_a_combination(build: Build, tmp_path: Path) -> None:
    own = base("gpt2", build)
    adapter = inject(own, [LoRA(r=2, targets="c_attn"), PromptTuning(tokens=N)])
    perturb(adapter.parameters())
    adapter.export(tmp_path, part="prompt")
    lora = adapter.deltas_of(adapter.methods[0])
    with torch.no_grad():
        for delta in lora.values():
            delta.get_parameter("lora_B").zero_()
    theirs = peft.PeftModel.from_pretrained(base("gpt2", build), tmp_path).eval()
    assert_same(own, theirs, "gpt2")


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "t5_odd"])
@pytest.mark.parametrize("beams", [1, 3])
def test_what_peft_wrote_writes_the_same(
    name: str, beams: int, build: Build, tmp_path: Path
) -> None:
    theirs, own = written_by_peft("prefix", name, build, tmp_path), base(name, build)
    load_adapter(own, tmp_path)
    batch = {key: x for key, x in inputs(name).items() if key != "decoder_input_ids"}
    settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    settings["eos_token_id"] = None
    assert torch.equal(own.generate(**batch, **settings), theirs.generate(**batch, **settings))


def test_the_second_half_of_two_parts_is_left_where_peft_leaves_it(
    build: Build, tmp_path: Path
) -> None:
    theirs = written_by_peft("prompt", "t5", build, tmp_path, num_transformer_submodules=2)
    assert len(load_file(tmp_path / TENSORS)["prompt_embeddings"]) == 2 * N
    own = base("t5", build)
    load_adapter(own, tmp_path)
    assert_same(own, theirs, "t5")


FAULTS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Any], str]] = {
    "task": ({"task_type": None}, lambda t: t, "`task_type` .* must name a task"),
    "another task": (
        {"task_type": "SEQ_2_SEQ_LM", "num_transformer_submodules": 2},
        lambda t: t,
        "load the class of model",
    ),
    "parts": ({"num_transformer_submodules": 2}, lambda t: t, "must be 1 for its task"),
    "tokens": ({"num_virtual_tokens": 4}, lambda t: t, r"must have shape \(4, "),
    "no tokens": ({"num_virtual_tokens": 0}, lambda t: t, "must be at least 1"),
    "unknown": ({"new_feature": True}, lambda t: t, "`new_feature` .* is not supported"),
    "NaN": ({}, lambda t: t / 0, "NaN or infinite"),
    "integers": ({}, lambda t: t.to(torch.int8), "floating-point|must be torch.float32"),
    "width": ({}, lambda t: t[:, :-1].contiguous(), "must have shape"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_faults_are_named_and_the_model_is_left_as_it_was(
    kind: str, fault: str, build: Build, tmp_path: Path
) -> None:
    written_by_peft(kind, "bert", build, tmp_path)
    changes, edit, reason = FAULTS[fault]
    config = json.loads((tmp_path / THEIR_CONFIG).read_text()) | changes
    (tmp_path / THEIR_CONFIG).write_text(json.dumps(config))
    tensors = load_file(tmp_path / TENSORS)
    save_file(
        tensors | {"prompt_embeddings": edit(tensors["prompt_embeddings"])}, tmp_path / TENSORS
    )
    model = base("bert", build)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(PEFTError, match=reason):
        load_adapter(model, tmp_path)
    assert adapters_of(model) == {}
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("lacking", ["prompt_embeddings", "base_model.classifier.bias"])
def test_a_missing_tensor_is_named(lacking: str, build: Build, tmp_path: Path) -> None:
    written_by_peft("prompt", "bert", build, tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    del tensors[lacking]
    save_file(tensors, tmp_path / TENSORS)
    with pytest.raises(PEFTError, match=f"`{lacking}` is missing"):
        load_adapter(base("bert", build), tmp_path)
