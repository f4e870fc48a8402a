"""peft computes with a folder of ours what we compute; and the folder comes back bit by bit."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_peft import LoRA, Targets, inject, load_adapter
from lightning_peft.carrying.registry import adapters_of
from lightning_peft.errors import AdapterError, ConfigError
from lightning_peft.files.adapter_folder import CONFIG, TENSORS, THEIR_CONFIG
from lightning_peft.method import Method
from lightning_peft.methods import (
    BOFT,
    C3A,
    IA3,
    OFT,
    AdaLoRA,
    BitFit,
    DoRA,
    FourierFT,
    Freeze,
    HiRA,
    LNTuning,
    LoHa,
    LoKr,
    LoRAPlus,
    MiSS,
    OLoRA,
    PiSSA,
    SHiRA,
    TrainableTokens,
    VeRA,
)
from tests.files.peft.exchange import QUIET, example, in_peft, perturb

Build = Callable[[str], Any]

pytestmark = QUIET

HOSTS = {
    "bert": ["query", "value", "output.dense"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "t5": ["q", "wo"],
    "vit": ["q_proj", "fc2"],
    "cnn": ["conv_stem", "conv_pw"],
}
EVERY = tuple(HOSTS)
DENSE = ("bert", "llama", "t5", "vit")

METHODS: dict[str, tuple[Callable[..., Method], tuple[str, ...]]] = {
    "lora": (lambda **kw: LoRA(r=3, **kw), EVERY),
    "rslora": (lambda **kw: LoRA(r=3, alpha=5, rslora=True, **kw), EVERY),
    "lora-plus": (lambda **kw: LoRAPlus(r=3, **kw), ("bert", "llama")),
    "dora": (lambda **kw: DoRA(r=3, **kw), EVERY),
    "adalora": (AdaLoRA, (*DENSE, "gpt2")),
    "vera": (lambda **kw: VeRA(r=16, seed=3, **kw), (*DENSE, "gpt2")),
    "loha": (lambda **kw: LoHa(r=2, alpha=3, **kw), (*DENSE, "cnn")),
    "lokr": (lambda **kw: LoKr(r=2, alpha=3, **kw), (*DENSE, "cnn")),
    "lokr-decomposed": (lambda **kw: LoKr(r=1, decompose_both=True, factor=3, **kw), ("bert",)),
    "oft": (lambda **kw: OFT(block_size=20, **kw), DENSE),
    "oft-exact": (lambda **kw: OFT(block_size=8, terms=None, **kw), DENSE),
    "boft": (lambda **kw: BOFT(block_size=4, factors=1, **kw), DENSE),
    "hira": (lambda **kw: HiRA(r=4, **kw), EVERY),
    "shira": (lambda **kw: SHiRA(r=4, seed=3, **kw), DENSE),
    "miss": (lambda **kw: MiSS(r=7, **kw), DENSE),
    "fourierft": (lambda **kw: FourierFT(frequencies=30, scale=90.0, seed=3, **kw), DENSE),
    "c3a": (lambda **kw: C3A(block_size=8, **kw), DENSE),
}
CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    f"{method}-{model}": (model, make(targets=HOSTS[model]), {})
    for method, (make, models) in METHODS.items()
    for model in models
}
CASES |= {f"ia3-{model}": (model, IA3(), {}) for model in EVERY}
CASES |= {f"ln-{model}": (model, LNTuning(), {}) for model in EVERY}
CASES |= {
    "lora-by-structure": ("llama", LoRA(r=2), {}),
    "lora-on-all-linear": ("gpt2", LoRA(r=2, targets="all-linear"), {}),
    "lora-by-patterns": (
        "bert",
        LoRA(
            targets=r"re:.*encoder.*(query|dense)",
            rank_pattern={"query": 2, r"re:.*layer\.1\.output\.dense": 3},
            alpha_pattern={"attention.output.dense": 5},
        ),
        {},
    ),
    "lora-in-a-layer": ("bert", LoRA(targets="query", layers=[-1]), {}),
    "lora-but-some": ("bert", LoRA(targets=Targets("query", exclude="layer.0.*")), {}),
    "lora-with-dropout": ("bert", LoRA(dropout=0.1), {}),
    "lora-in-groups": ("cnn", LoRA(targets="conv_dw", r=16), {}),
    "lora-on-words": ("llama", LoRA(targets=["embed_tokens", "q_proj"]), {}),
    "lora-on-padded-words": ("bert", LoRA(targets=["word_embeddings"]), {}),
    "lora-on-scaled-words": ("bart", LoRA(targets=["embed_tokens"]), {}),
    "lora-on-tied-words": ("gemma3", LoRA(targets=["embed_tokens", "q_proj"]), {}),
    "lora-on-the-vocabulary": ("gemma3", LoRA(targets=["lm_head", "q_proj"]), {}),
    "lora-with-its-biases": ("bert", LoRA(targets="query", bias="lora"), {}),
    "lora-with-all-biases": ("bert", LoRA(targets="query", bias="all"), {}),
    "lora-and-no-head": ("bert", LoRA(targets="query"), {"head": False}),
    "lora-and-part-of-a-head": (
        "bert", LoRA(targets="query"), {"head": False, "train": ["classifier.weight"]},
    ),
    "lora-and-words": ("llama", LoRA(targets="q_proj"), {"train": ["embed_tokens", "lm_head"]}),
    "lora-and-tied-words": ("gpt2", LoRA(targets="c_attn"), {"train": ["lm_head"]}),
    "lora-and-a-norm": ("gpt2", LoRA(targets="c_attn"), {"train": ["ln_f"]}),
    "lora-and-a-deep-head": ("roberta", LoRA(r=2), {}),
    "lora-and-a-score": ("llama_classifier", LoRA(r=2), {}),
    "lora-on-windows": ("swin", LoRA(r=2), {}),
    "lora-on-stages": ("resnet", LoRA(r=2), {}),
    "lora-on-experts": ("mixtral", LoRA(r=3, targets=["experts", "q_proj"], dropout=0.1), {}),
    "lora-on-turned-experts": ("gptoss", LoRA(r=3, targets="experts", layers=[1]), {}),
    "lora-on-attention": ("attending", LoRA(r=2, targets="mha"), {}),
    "lora-on-whole-attention": ("attending", LoRA(r=2, targets=["mha", "mha.out_proj"]), {}),
    "lora-with-tokens": ("gpt2", [LoRA(r=2), TrainableTokens(token_ids=(62, 4, 18))], {}),
    "dora-on-words": ("bert", DoRA(targets=["word_embeddings", "query"]), {}),
    "hira-on-words": ("bert", HiRA(r=4, targets="word_embeddings"), {}),
    "ia3-by-patterns": ("llama", IA3(keys_values=(), feed_forward="up_proj"), {}),
    "ln-without-biases": ("bert", LNTuning(bias=False), {}),
    "tokens": ("bert", TrainableTokens(token_ids=(62, 4, 18)), {}),
    "tokens-of-a-tied-table": ("gemma3", TrainableTokens(token_ids=(62, 4, 18)), {}),
    "tokens-of-an-encoder-decoder": ("t5", TrainableTokens(token_ids=(62, 4, 18)), {}),
}  # fmt: skip

FAST = ("bert", "llama")
"""The models that every method is tried on; on others most of them are marked slow."""

ROUNDED = ("c3a", "fourierft")
"""What peft computes in single precision whatever the model is in."""


def cells() -> Iterator[Any]:
    for case, (model, method, _) in CASES.items():
        slow = case.endswith(f"-{model}") and model not in FAST and not isinstance(method, LoRA)
        yield pytest.param(case, marks=pytest.mark.slow) if slow else case


@pytest.mark.parametrize("case", list(cells()))
def test_peft_computes_what_we_saved(case: str, build: Build, tmp_path: Path) -> None:
    model, method, settings = CASES[case]
    ours = example(model, build)
    base, adapter = ours.logits(), inject(ours.model, method, **settings)
    perturb(adapter.parameters())
    adapter.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, TENSORS, THEIR_CONFIG}
    expected = ours.logits()
    assert not torch.allclose(base, expected, rtol=1e-3)
    theirs = ours.logits(in_peft(model, build, tmp_path))
    torch.testing.assert_close(theirs, expected, rtol=1e-5, atol=3e-6)

    again = example(model, build)
    loaded = load_adapter(again.model, tmp_path)
    state = adapter.state_dict()
    assert {n: t.shape for n, t in loaded.state_dict().items()} == {
        n: t.shape for n, t in state.items()
    }
    assert all(torch.equal(t, state[n]) for n, t in loaded.state_dict().items())
    assert torch.equal(again.logits(), expected)
    assert {p.name: p.read_bytes() for p in loaded.save(tmp_path / "twice").iterdir()} == {
        p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()
    }


@pytest.mark.parametrize(
    "case", [f"{method}-llama" for method in METHODS if "llama" in METHODS[method][1]]
)
def test_in_double_precision(case: str, build: Build, tmp_path: Path) -> None:
    model, method, settings = CASES[case]
    ours = example(model, build, torch.float64)
    adapter = inject(ours.model, method, **settings)
    perturb(adapter.parameters())
    theirs = ours.logits(in_peft(model, build, adapter.save(tmp_path), torch.float64))
    tolerance = 1e-5 if case.startswith(ROUNDED) else 1e-12
    torch.testing.assert_close(theirs, ours.logits(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("model", ["bert", "gpt2", "mixtral"])
@pytest.mark.parametrize("method", [PiSSA, OLoRA])
def test_departures_are_exported_as_a_plain_difference(
    method: Any, model: str, build: Build, tmp_path: Path
) -> None:
    ours = example(model, build)
    hosts = HOSTS.get(model, ["experts", "q_proj"])
    adapter = inject(ours.model, method(r=3, targets=hosts))
    perturb(adapter.parameters())
    assert not (adapter.save(tmp_path / "own") / THEIR_CONFIG).exists()
    adapter.export(tmp_path / "theirs")
    theirs = in_peft(model, build, tmp_path / "theirs")
    assert theirs.peft_config["default"].r == 6
    torch.testing.assert_close(ours.logits(theirs), ours.logits(), rtol=1e-5, atol=3e-6)
    again = example(model, build)
    loaded = load_adapter(again.model, tmp_path / "theirs")
    assert [type(each) for each in loaded.methods] == [LoRA]
    torch.testing.assert_close(again.logits(), ours.logits(), rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("part", ["lora", "ia3"])
def test_a_part_of_a_combination_is_exported_alone(part: str, build: Build, tmp_path: Path) -> None:
    methods = {"lora": LoRA(targets="query"), "ia3": IA3(feed_forward=())}
    ours, alone = example("bert", build), example("bert", build)
    both = inject(ours.model, list(methods.values()))
    perturb(both.parameters())
    assert not (both.save(tmp_path / "both") / THEIR_CONFIG).exists()
    with pytest.raises(AdapterError, match=r"no combination of methods.*part='lora'"):
        both.export(tmp_path / "both")
    one = inject(alone.model, methods[part])
    one.load_state_dict({name: both.state_dict()[name] for name in one.state_dict()})
    theirs = alone.logits(in_peft("bert", build, both.export(tmp_path / part, part=part)))
    torch.testing.assert_close(theirs, alone.logits(), rtol=1e-5, atol=3e-6)


REFUSED: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "unknown": ("bert", BitFit(), {}, "no counterpart of BitFit"),
    "layers-alone": ("bert", Freeze(), {}, "no counterpart of Freeze"),
    "inside-what-is-trained": (
        "bert", LoRA(targets="query"), {"train": ["encoder.layer.1"]}, "one or the other",
    ),
    "a-name-of-many": ("encoder_with_head", LoRA(), {}, "further modules by the name of `dense`"),
    "past-the-layers": ("tagger", LoRA(targets="linear1"), {}, "reads weights past"),
    "decomposed-experts": ("mixtral", DoRA(targets="experts"), {}, "cannot decompose"),
    "shared-places": ("cnn", SHiRA(r=1, targets="conv_pw"), {}, "does not change a Conv2d"),
    "turned-weights": ("gpt2", LoHa(targets="c_attn"), {}, "does not change a Conv1D"),
    "scaled-entries": ("bert", SHiRA(r=1, scale=2.0), {}, "has no `scale`"),
    "uneven-blocks": ("bert", BOFT(block_size=12, factors=2), {}, "one block size"),
    "a-whole-table": ("bert", TrainableTokens(), {}, "whole table"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_cannot_hold_is_refused_and_kept_by_ours(
    case: str, build: Build, tmp_path: Path
) -> None:
    model, method, settings, reason = REFUSED[case]
    ours = example(model, build)
    adapter = inject(ours.model, method, **settings)
    perturb(adapter.parameters())
    with pytest.raises(AdapterError, match=reason):
        adapter.export(tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()
    assert {path.name for path in adapter.save(tmp_path).iterdir()} == {CONFIG, TENSORS}
    again = example(model, build)
    load_adapter(again.model, tmp_path)
    assert torch.equal(again.logits(), ours.logits())


def test_an_unknown_format_and_an_unknown_part_are_named(build: Build, tmp_path: Path) -> None:
    adapter = inject(example("bert", build).model, LoRA())
    with pytest.raises(ConfigError, match=r"`format` must be one of .*peft.*'pef'.*Did you mean"):
        adapter.export(tmp_path, "pef")
    with pytest.raises(AdapterError, match=r"`part` must name one of lora, but is 'ia3'"):
        adapter.export(tmp_path, part="ia3")
    assert not list(tmp_path.iterdir())


def test_adapters_beside_each_other_are_saved_each_as_its_own(build: Build, tmp_path: Path) -> None:
    ours, expected = example("roberta", build), {}
    for name in ("first", "second"):
        adapter = inject(ours.model, LoRA(r=2, targets="query"), name)
        perturb(adapter.parameters())
        expected[name] = ours.logits()
    for name, adapter in adapters_of(ours.model).items():
        theirs = ours.logits(in_peft("roberta", build, adapter.save(tmp_path / name)))
        torch.testing.assert_close(theirs, expected[name], rtol=1e-5, atol=3e-6)
        again = example("roberta", build)
        load_adapter(again.model, tmp_path / name)
        assert torch.equal(again.logits(), expected[name])


def test_a_later_save_leaves_nothing_of_an_earlier_one(build: Build, tmp_path: Path) -> None:
    first = example("bert", build)
    inject(first.model, LoRA()).save(tmp_path)
    second = example("bert", build)
    inject(second.model, [LoRA(), IA3()]).save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, TENSORS}
    inject(example("bert", build).model, LoRA()).export(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {THEIR_CONFIG, TENSORS}
