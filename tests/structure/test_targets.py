"""Which modules a pattern, an index or a model's structure names."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from lightning_peft import LoRA, Targets, inject
from lightning_peft.deltas.hosts import can_adapt
from lightning_peft.errors import TargetError
from lightning_peft.structure.anatomy import is_linear
from lightning_peft.structure.targets import all_linear, matches, trained_in_place

Build = Callable[[str], Any]

ATTENTION = [f"bert.encoder.layer.{i}.attention.self" for i in (0, 1)]


def find(model: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
    return list(Targets(*args, **kwargs).find(model, can_adapt, "Linear layers"))


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("query", "layer.0.query", True),
        ("query", "query", True),
        ("query", "layer.0.query_proj", False),
        ("layer.0.*", "encoder.layer.0.query", True),
        ("*_proj", "a.q_proj", True),
        ("q_proj", "aq_proj", False),
        ("[qv]_proj", "a.v_proj", True),
        ("Query", "a.query", False),
        ("re:.*(query|value)", "a.value", True),
        ("re:query", "a.query", False),
    ],
)
def test_matches(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"include": "query"}, [f"{a}.query" for a in ATTENTION]),
        (
            {"include": ["query", "value"]},
            [f"{a}.{part}" for a in ATTENTION for part in ("query", "value")],
        ),
        ({"include": "layer.1.attention.self.*", "exclude": "key"}, [
            f"{ATTENTION[1]}.query", f"{ATTENTION[1]}.value",
        ]),
        ({"include": r"re:.*layer\.0.*\.query"}, [f"{ATTENTION[0]}.query"]),
        ({"include": "query", "layers": [-1]}, [f"{ATTENTION[1]}.query"]),
        ({"include": "query", "layers": [0, 1]}, [f"{a}.query" for a in ATTENTION]),
        ({"include": ["word_embeddings", "classifier"]}, [
            "bert.embeddings.word_embeddings", "classifier",
        ]),
        ({"exclude": ["*.output.dense", "intermediate.dense"], "layers": (0,)}, [
            f"{ATTENTION[0]}.{part}" for part in ("query", "key", "value")
        ]),
    ],
)  # fmt: skip
def test_finds_in_the_models_order(
    settings: dict[str, Any], expected: list[str], build: Build
) -> None:
    assert find(build("bert").model, **settings) == expected


def test_all_linear_leaves_out_head_and_vocabulary(build: Build) -> None:
    for name, count in {
        "bert": 13,
        "llama": 14,
        "llama_classifier": 14,
        "gpt2": 8,
        "t5": 32,
        "mlp": 2,
        "encoder_with_head": 13,
        "tagger": 8,
        "translator": 20,
    }.items():
        found = all_linear(build(name).model)
        assert len(found) == count, (name, found)
        assert not {"classifier", "score", "lm_head", "head", "output", "dense"} & set(found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"include": "qury"}, "`qury` matches no module of the model. Did you mean `query` or"),
        ({"include": ["query", "valeu"]}, "`valeu` matches no module of the model. Did you mean"),
        ({"include": "xyz"}, "`xyz` matches no module of the model. Its modules end in"),
        ({"include": ""}, "`` matches no module"),
        ({"include": "query", "exclude": "key"}, "`key` matches no module"),
        ({"include": "re:("}, "`re:(` is no regular expression"),
        ({"include": "self"}, "matches `bert.encoder.layer.0.attention.self` (BertSelfAttention)"),
        ({"include": "*LayerNorm"}, "but this method changes Linear layers"),
        ({"include": "query", "exclude": "*"}, "leaves no module"),
        ({"include": "classifier", "layers": [0]}, "leaves no module"),
        ({"include": ()}, "leaves no module"),
        ({"include": "query", "layers": []}, "leaves no module"),
        ({"include": "query", "layers": [2]}, "`layers` must lie in [-2, 2), but 2 does not"),
        ({"include": "query", "layers": [0, -3]}, "but -3 does not"),
    ],
)
def test_what_matches_nothing_is_refused(
    settings: dict[str, Any], message: str, build: Build
) -> None:
    with pytest.raises(TargetError) as raised:
        find(build("bert").model, **settings)
    assert message in str(raised.value)


@pytest.mark.parametrize("targets", ["out_proj", "*.self_attn.out_proj"])
def test_what_is_read_and_never_called_is_refused_by_name(targets: str, build: Build) -> None:
    model = build("tagger").model
    with pytest.raises(TargetError, match=r"`encoder\.layers\.0\.self_attn\.out_proj` is read by"):
        Targets(targets).find(model, is_linear, "Linear layers")


def test_what_is_never_called_is_left_out_of_wider_patterns(build: Build) -> None:
    found = [*Targets("layers.*").find(build("tagger").model, is_linear, "Linear layers")]
    assert found == [f"encoder.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]


def test_layers_of_a_model_without_layers(build: Build) -> None:
    with pytest.raises(TargetError, match="MLP has no layer stack, but is"):
        find(build("mlp").model, "fc1", layers=[0])


def test_a_second_adapter_does_not_target_the_first(build: Build) -> None:
    model = build("bert").model
    inject(model, LoRA(targets="query"), "one", head=False)
    assert not any("lightning_peft" in name for name in find(model, "*"))
    with pytest.raises(TargetError, match="matches no"):
        find(model, "one_lora")


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("head", ["head.weight", "head.bias"]),
        ("head.*", ["head.weight", "head.bias"]),
        ("*.bias", ["fc1.bias", "fc2.bias", "head.bias"]),
        (["fc2.bias", "head.weight"], ["fc2.bias", "head.weight"]),
        (r"re:fc\d", ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]),
        (r"re:fc1\.bias", ["fc1.bias"]),
    ],
)
def test_trained_in_place(patterns: Any, expected: list[str], build: Build) -> None:
    assert trained_in_place(build("mlp").model, patterns) == expected


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("haed", "train='haed' matches no module of the model. Did you mean `head`?"),
        (["head", "fc9"], "train='fc9' matches no module"),
        ("re:[", "`re:[` is no regular expression"),
    ],
)
def test_training_what_is_not_there_is_refused(patterns: Any, message: str, build: Build) -> None:
    model = build("mlp").model
    with pytest.raises(TargetError) as raised:
        inject(model, LoRA(), train=patterns)
    assert message in str(raised.value)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_both_names_of_a_tied_weight_can_be_used(build: Build) -> None:
    model = build("gpt2").model
    assert trained_in_place(model, "lm_head") == ["transformer.wte.weight"]
    assert trained_in_place(model, ["wte", "lm_head.weight"]) == ["transformer.wte.weight"]


def test_names_like_numbers_and_words_of_python() -> None:
    model = nn.ModuleDict({"0": nn.Linear(2, 2), "class": nn.Linear(2, 2), "a b": nn.Linear(2, 2)})
    for name in model:
        assert find(model, name) == [name]
        adapter = inject(model, LoRA(r=1, targets=name), train=f"{name}.bias", head=False)
        assert len(adapter.parameters()) == 3
        adapter.remove()
