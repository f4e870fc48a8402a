"""We compute with a folder of peft's what peft computes, and train on from there."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_peft import LoRA, load_adapter
from lightning_peft.methods import AdaLoRA, DoRA, OLoRA, PiSSA, TrainableTokens
from tests.files.peft.exchange import (
    QUIET,
    assert_trains_on,
    example,
    in_peft,
    peft,
    perturb,
)

Build = Callable[[str], Any]

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def lora(*targets: str, **settings: Any) -> Any:
    return peft.LoraConfig(**({"target_modules": list(targets), "r": 3} | settings))


HEAD: dict[str, Any] = {"modules_to_save": ["classifier"]}
CASES: dict[str, tuple[str, Any]] = {
    "lora": ("bert", lora("query", "value", **HEAD)),
    "by-an-expression": ("bert", lora(target_modules=r".*layer\.1.*(key|intermediate\.dense)")),
    "on-all-linear": ("llama", lora(target_modules="all-linear")),
    "on-all-linear-with-a-head": ("bert", lora(target_modules="all-linear", task_type="SEQ_CLS")),
    "for-a-task": ("bert", lora("query", task_type="SEQ_CLS")),
    "for-a-task-with-a-score": ("llama_classifier", lora("q_proj", task_type="SEQ_CLS")),
    "in-layers": ("llama", lora("q_proj", layers_to_transform=[1], layers_pattern="layers")),
    "in-a-layer": ("t5", lora("q", "wo", layers_to_transform=1)),
    "but-some": ("bert", lora("query", "value", exclude_modules=["0.attention.self.value"])),
    "but-an-expression": ("bert", lora("dense", exclude_modules=r".*(pooler|layer\.0\.).*")),
    "ranks-and-alphas": (
        "llama",
        lora(
            "q_proj", "v_proj", "down_proj", lora_alpha=5,
            rank_pattern={r"layers\.1\..*v_proj": 5, "down_proj": 2}, alpha_pattern={"v_proj": 9},
        ),
    ),
    "rslora": ("llama", lora("q_proj", use_rslora=True, lora_alpha=7)),
    "rslora-by-patterns": (
        "llama", lora("q_proj", "v_proj", use_rslora=True, rank_pattern={"v_proj": 7}),
    ),
    "dora": ("bert", lora("query", "word_embeddings", use_dora=True, **HEAD)),
    "dora-by-the-root": ("llama", lora("q_proj", use_dora=True, use_rslora=True)),
    "dora-on-kernels": ("cnn", lora("conv_stem", use_dora=True)),
    "on-conv1d": ("gpt2", lora("c_attn", "c_fc", fan_in_fan_out=True)),
    "on-kernels": ("cnn", lora("conv_stem", "conv_pw")),
    "on-kernels-in-groups": ("cnn", lora("conv_dw", r=16)),
    "on-words": ("llama", lora("embed_tokens", "q_proj")),
    "on-scaled-words": ("bart", lora("encoder.embed_tokens")),
    "on-tied-words": ("gemma3", lora("embed_tokens", "q_proj")),
    "with-its-biases": ("bert", lora("query", bias="lora_only")),
    "with-all-biases": ("bert", lora("query", bias="all", **HEAD)),
    "with-words": ("llama", lora("q_proj", modules_to_save=["embed_tokens", "lm_head"])),
    "with-tokens": ("llama", lora("q_proj", trainable_token_indices=[62, 18, 4])),
    "with-tokens-by-name": ("gpt2", lora("c_attn", trainable_token_indices={"wte": [62, 18]})),
    "on-experts": ("mixtral", lora("q_proj", target_parameters=["gate_up_proj", "down_proj"])),
    "on-turned-experts": (
        "gptoss",
        lora(target_parameters=["1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"]),
    ),
    "on-attention": ("attending", lora("mha", rank_pattern={"mha": 2}, lora_alpha=5)),
    "pissa": ("llama", lora("q_proj", init_lora_weights="pissa")),
    "olora": ("llama", lora("q_proj", init_lora_weights="olora")),
    "orthogonal": ("bert", lora("query", r=4, init_lora_weights="orthogonal")),
    "adalora": ("bert", peft.AdaLoraConfig(target_modules=["query"], total_step=9, **HEAD)),
    "adalora-on-conv1d": (
        "gpt2", peft.AdaLoraConfig(target_modules=["c_attn"], total_step=9, fan_in_fan_out=True),
    ),
    "vera": ("bert", peft.VeraConfig(target_modules=["query", "output.dense"], r=8)),
    "vera-by-its-seed": (
        "llama",
        lambda: peft.VeraConfig(
            target_modules=["q_proj", "down_proj"], r=8, save_projection=False,
            projection_prng_key=3,
        ),
    ),
    "loha": ("bert", peft.LoHaConfig(target_modules=["query"], r=2, alpha=3)),
    "lokr": ("llama", peft.LoKrConfig(target_modules=["q_proj"], r=2, decompose_factor=3)),
    "oft": ("llama", peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8)),
    "oft-exact": (
        "bert",
        peft.OFTConfig(target_modules=["query"], oft_block_size=8, use_cayley_neumann=False),
    ),
    "boft": ("bert", peft.BOFTConfig(target_modules=["query"], boft_block_size=8, **HEAD)),
    "hira": ("llama", peft.HiraConfig(target_modules=["q_proj", "embed_tokens"], r=4)),
    "hira-on-kernels": ("cnn", peft.HiraConfig(target_modules=["conv_stem", "conv_pw"], r=4)),
    "shira": ("llama", peft.ShiraConfig(target_modules=["q_proj"], r=3, random_seed=4)),
    "miss": ("bert", peft.MissConfig(target_modules=["query", "output.dense"], r=7)),
    "fourierft": ("bert", peft.FourierFTConfig(target_modules=["query"], n_frequency=30)),
    "c3a": ("llama", peft.C3AConfig(target_modules=["q_proj", "gate_proj"], block_size=8)),
    "ia3": (
        "bert",
        peft.IA3Config(
            target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"],
            **HEAD,
        ),
    ),
    "ia3-by-expressions": (
        "t5",
        peft.IA3Config(target_modules=r".*\.(k|v|wo)", feedforward_modules=r".*\.wo"),
    ),
    "ia3-on-kernels": (
        "cnn",
        peft.IA3Config(target_modules=["conv_pw", "conv_pwl"], feedforward_modules=["conv_pw"]),
    ),
    "ln-tuning": ("bert", peft.LNTuningConfig(target_modules=["LayerNorm"], **HEAD)),
    "ln-tuning-with-statistics": ("cnn", peft.LNTuningConfig(target_modules=["bn1", "bn2"])),
    "tokens": (
        "llama",
        peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[62, 18]),
    ),
    "tokens-of-a-tied-table": (
        "gemma3",
        peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[62, 18, 4]),
    ),
}  # fmt: skip


def by_peft(model: str, config: Any, build: Build, folder: Path) -> Any:
    """Return peft's model with a perturbed adapter, and write it to `folder`."""
    config = config() if callable(config) else copy.deepcopy(config)  # peft changes it
    theirs = peft.get_peft_model(example(model, build).model, config).eval()
    perturb([p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("case", CASES)
def test_we_compute_what_peft_saved_and_train_on(case: str, build: Build, tmp_path: Path) -> None:
    model, config = CASES[case]
    theirs = by_peft(model, config, build, tmp_path)
    ours = example(model, build)
    base = ours.logits()
    adapter = load_adapter(ours.model, tmp_path)
    expected = ours.logits(theirs)
    torch.testing.assert_close(ours.logits(), expected, rtol=1e-5, atol=5e-6)
    assert not torch.allclose(base, expected, rtol=1e-3)
    assert_trains_on(ours, adapter)

    if not case.startswith(("pissa", "olora")):  # which peft would compute once more
        again = ours.logits(in_peft(model, build, adapter.save(tmp_path / "again")))
        torch.testing.assert_close(again, ours.logits(), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize(
    ("case", "methods"),
    [
        ("lora", (LoRA(r=3, alpha=8, targets=("query", "value")),)),
        ("in-layers", (LoRA(r=3, alpha=8, targets=("1.self_attn.q_proj",)),)),
        ("dora-by-the-root", (DoRA(r=3, alpha=8 * 3**0.5, targets=("q_proj",)),)),
        ("pissa", (PiSSA(r=3, alpha=8, targets=("q_proj",), niter=0),)),
        ("olora", (OLoRA(r=3, alpha=8, targets=("q_proj",)),)),
        (
            "with-tokens",
            (
                LoRA(r=3, alpha=8, targets=("q_proj",)),
                TrainableTokens(token_ids=(62, 18, 4), targets=("embed_tokens",)),
            ),
        ),
    ],
)
def test_the_methods_are_our_own(case: str, methods: Any, build: Build, tmp_path: Path) -> None:
    model, config = CASES[case]
    by_peft(model, config, build, tmp_path)
    adapter = load_adapter(example(model, build).model, tmp_path, name="theirs")
    assert (adapter.name, adapter.methods) == ("theirs", methods)


def test_ranks_that_peft_took_away_come_back_as_zeros(build: Build, tmp_path: Path) -> None:
    config = peft.AdaLoraConfig(target_modules=["query"], total_step=9, init_r=6)
    model = example("bert", build).model
    theirs = peft.get_peft_model(model, config).eval()
    perturb([p for p in theirs.parameters() if p.requires_grad])
    kept = [True, False, True, True, False, False]
    host = "bert.encoder.layer.0.attention.self.query"
    with torch.no_grad():
        values = theirs.get_submodule(f"base_model.model.{host}").lora_E["default"]
        values[~torch.tensor(kept)] = 0.0
    theirs.peft_config["default"].rank_pattern = {f"{host}.lora_E.default": kept}
    theirs.save_pretrained(tmp_path)
    ours = example("bert", build)
    adapter = load_adapter(ours.model, tmp_path)
    assert isinstance(adapter.methods[0], AdaLoRA)
    values = adapter.state_dict()[f"{host}.lightning_peft.default_adalora.lora_E"]
    assert (values == 0).sum() == 3
    torch.testing.assert_close(ours.logits(), ours.logits(theirs), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize(
    "others",
    [
        {},  # as early versions wrote it
        {"corda_config": None, "eva_config": None, "loftq_config": {}, "lora_bias": False},
        {"eva_config": {"rho": 2.0}, "init_lora_weights": "eva", "megatron_config": None},
        {"megatron_core": "megatron.core", "alora_invocation_tokens": None, "arrow_config": None},
        {"task_type": "CAUSAL_LM", "revision": "main", "library_name": "x", "some_later_one": None},
        {"qalora_group_size": 16, "use_qalora": False, "runtime_config": {"x": 1}},
    ],
    ids=str,
)  # fmt: skip
def test_files_of_other_versions_load(others: Any, build: Build, tmp_path: Path) -> None:
    theirs = by_peft("llama", lora("q_proj", lora_alpha=4), build, tmp_path)
    needed = {"peft_type": "LORA", "r": 3, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(needed | others))
    ours = example("llama", build)
    load_adapter(ours.model, tmp_path)
    torch.testing.assert_close(ours.logits(), ours.logits(theirs), rtol=1e-5, atol=5e-6)


def test_half_precision_and_names_of_adapters(build: Build, tmp_path: Path) -> None:
    model = example("llama", build, torch.bfloat16)
    theirs = peft.get_peft_model(
        model.model, lora("q_proj"), adapter_name="mine", autocast_adapter_dtype=False
    )
    perturb([p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(tmp_path)  # in a folder of the adapter's name
    ours = example("llama", build, torch.bfloat16)
    adapter = load_adapter(ours.model, tmp_path / "mine")
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    torch.testing.assert_close(ours.logits(), ours.logits(theirs), rtol=0.05, atol=0.05)


def test_heads_that_early_versions_did_not_list(build: Build, tmp_path: Path) -> None:
    config = lora("query", task_type="SEQ_CLS")
    theirs = by_peft("bert", config, build, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"modules_to_save": None}))
    ours = example("bert", build)
    adapter = load_adapter(ours.model, tmp_path)
    assert adapter.in_place == ["classifier.bias", "classifier.weight"]
    torch.testing.assert_close(ours.logits(), ours.logits(theirs), rtol=1e-5, atol=5e-6)


def test_what_only_acts_in_training_is_told(build: Build, tmp_path: Path) -> None:
    by_peft("bert", peft.LoHaConfig(target_modules=["query"], rank_dropout=0.1), build, tmp_path)
    with pytest.warns(UserWarning, match=r"`rank_dropout` = 0.1 in .* will not act"):
        load_adapter(example("bert", build).model, tmp_path)
