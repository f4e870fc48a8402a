"""Layers, attention, feed-forward, embeddings and head, found by structure."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lightning_peft import Freeze, LoRA, inject
from lightning_peft.structure import anatomy, sublayers
from lightning_peft.structure.tops import above_layers, running_order

Build = Callable[[str], Any]


def above(model: nn.Module) -> list[str]:
    return above_layers(model, running_order(model))


def names(found: list[Any]) -> list[str]:
    return [name for name, _ in found]


LAYERS = {
    "bert": "bert.encoder.layer.{}",
    "bert_base": "encoder.layer.{}",
    "roberta": "roberta.encoder.layer.{}",
    "distilbert": "distilbert.transformer.layer.{}",
    "llama": "model.layers.{}",
    "gpt2": "transformer.h.{}",
    "vit": "vit.layers.{}",
    "tagger": "encoder.layers.{}",
    "cnn": "blocks.{}",
    "encoder_with_head": "encoder.encoder.layer.{}",
}
TWO_STACKS = {
    "t5": ("encoder.block.{}", "decoder.block.{}"),
    "bart": ("model.encoder.layers.{}", "model.decoder.layers.{}"),
    "translator": ("transformer.encoder.layers.{}", "transformer.decoder.layers.{}"),
    "swin": ("swin.encoder.layers.0.blocks.{}", "swin.encoder.layers.1.blocks.{}"),
    "resnet": ("resnet.encoder.stages.0.layers.{}", "resnet.encoder.stages.1.layers.{}"),
}
HEADS: dict[str, list[str]] = {
    "bert": ["classifier"],
    "bert_base": [],
    "roberta": ["classifier"],
    "distilbert": ["pre_classifier", "classifier"],
    "llama": [],
    "llama_classifier": ["score"],
    "gpt2": [],
    "gpt2_classifier": ["score"],
    "t5": [],
    "bart": [],
    "vit": ["classifier"],
    "swin": ["classifier"],
    "resnet": ["classifier"],
    "mlp": ["head"],
    "cnn": ["classifier"],
    "translator": [],
    "tagger": ["head"],
    "encoder_with_head": ["dense", "norm", "output"],
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, build: Build) -> None:
    assert names(anatomy.layers(build(name).model)) == [LAYERS[name].format(i) for i in (0, 1)]


@pytest.mark.parametrize("name", TWO_STACKS)
def test_layers_of_two_stacks_in_order(name: str, build: Build) -> None:
    expected = [stack.format(i) for stack in TWO_STACKS[name] for i in (0, 1)]
    assert names(anatomy.layers(build(name).model)) == expected


@pytest.mark.parametrize("name", HEADS)
def test_head(name: str, build: Build) -> None:
    model = build(name).model
    assert names(anatomy.head(model)) == HEADS[name]
    parameters = anatomy.head_parameters(model)
    assert all(model.get_parameter(parameter) is not None for parameter in parameters)


@pytest.mark.parametrize("name", HEADS)
def test_an_adapter_does_not_change_what_is_found(name: str, build: Build) -> None:
    model = build(name).model

    def look() -> list[Any]:
        return [
            [n for n, _ in part(model)]
            for part in (
                anatomy.layers,
                anatomy.head,
                anatomy.attentions,
                anatomy.feed_forwards,
                anatomy.embeddings,
                anatomy.projections,
                anatomy.base_modules,
            )
        ]

    before = look()
    inject(model, LoRA(r=2))
    assert look() == before


@pytest.mark.parametrize(
    ("name", "attentions", "feed_forwards"),
    [
        ("bert", ["bert.encoder.layer.0.attention"], 2),
        ("llama", ["model.layers.0.self_attn"], 3),
        ("gpt2", ["transformer.h.0.attn"], 2),
        ("vit", ["vit.layers.0.attention"], 2),
        ("tagger", ["encoder.layers.0.self_attn"], 2),
        ("mlp", [], 0),
    ],
)
def test_attention_and_feed_forward(
    name: str, attentions: list[str], feed_forwards: int, build: Build
) -> None:
    model = build(name).model
    assert names(anatomy.attentions(model))[:1] == attentions
    assert len(anatomy.feed_forwards(model)) == 2 * feed_forwards


def test_embeddings_and_vocabulary(build: Build) -> None:
    model = build("bert").model
    assert [name.rpartition(".")[2] for name in names(anatomy.embeddings(model))] == [
        "word_embeddings",
        "position_embeddings",
        "token_type_embeddings",
    ]
    assert anatomy.vocabulary(model) == 64
    assert anatomy.vocabulary(build("vit").model) is None


@pytest.mark.parametrize(
    ("name", "count"),
    [("bert", 12), ("llama", 14), ("gpt2", 8), ("t5", 32), ("swin", 24), ("tagger", 8)],
)
def test_projections_are_the_layers_linear_ones(name: str, count: int, build: Build) -> None:
    found = anatomy.projections(build(name).model)
    assert len(found) == count
    assert all(anatomy.is_linear(m) or anatomy.read_weights(m) for _, m in found)


def test_projections_of_networks_without_linear_layers(build: Build) -> None:
    found = names(anatomy.projections(build("cnn").model))
    assert {name.rpartition(".")[2] for name in found} == {"conv_pw", "conv_pwl"}
    assert names(anatomy.projections(build("mlp").model)) == ["fc1", "fc2"]
    resnet = anatomy.projections(build("resnet").model)
    assert all(isinstance(module, nn.Conv2d) for _, module in resnet)


@pytest.mark.parametrize(
    ("cls", "head"),
    [
        ("BertForTokenClassification", ["classifier"]),
        ("BertForQuestionAnswering", ["qa_outputs"]),
        ("BertForMaskedLM", []),
        ("BertForMultipleChoice", ["classifier"]),
        ("BertForNextSentencePrediction", ["cls"]),
    ],
)
def test_heads_of_other_tasks(cls: str, head: list[str]) -> None:
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48,
    )  # fmt: skip
    assert names(anatomy.head(getattr(transformers, cls)(config))) == head


def test_a_head_as_wide_as_the_vocabulary_says_so_by_name() -> None:
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            num_labels=2,
        )
    )
    model.fresh_parameters = ["bert.pooler.dense.weight"]
    adapter = inject(model, LoRA(targets="query"))
    assert set(adapter.in_place) == {
        "bert.pooler.dense.weight", "classifier.weight", "classifier.bias",
    }  # fmt: skip


def test_a_mixture_of_experts_is_one_stack() -> None:
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.o = nn.Linear(4, 4), nn.Linear(4, 4)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = SelfAttention()
            self.experts = nn.ModuleList([Expert() for _ in range(4)])

    model = nn.Module()
    model.embed = nn.Embedding(7, 4)
    model.layers = nn.ModuleList([Layer() for _ in range(3)])
    assert names(anatomy.layers(model)) == [f"layers.{i}" for i in range(3)]
    assert len(anatomy.projections(model)) == 3 * (2 + 8)


def test_above_the_layers(build: Build) -> None:
    assert above(build("llama_classifier").model) == [
        "model.norm.weight",
        "score.weight",
    ]
    assert above(build("llama").model) == ["model.norm.weight"]


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(), nn.Identity(), nn.ReLU()])
def test_what_has_no_anatomy(model: nn.Module) -> None:
    assert anatomy.layers(model) == []
    assert anatomy.head(model) == []
    assert anatomy.vocabulary(model) is None


def test_a_sequential_model() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    adapter = inject(model, LoRA(r=2))
    assert [name for name, _, _ in adapter.deltas] == ["0", "2"]
    assert adapter.in_place == []
    assert model(torch.ones(1, 4)).shape == (1, 2)


def test_the_words_are_those_that_a_model_of_transformers_names() -> None:
    """Another table may be registered before them: of places in an image, of languages."""
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config)
    model.bert._modules = {"places": nn.Embedding(7, 32), **model.bert._modules}
    assert anatomy.vocabulary(model) == 64
    assert not anatomy.head(model)
    outside = nn.ModuleDict({"places": nn.Embedding(7, 32), "inner": model})
    assert anatomy.vocabulary(outside) == 64


def test_a_head_that_is_tied_has_the_first_of_its_names() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))
    model.first, model.score = nn.Linear(4, 3), nn.Linear(4, 3)
    model.first.weight = model.score.weight
    assert set(anatomy.head_parameters(model)) == {"first.weight", "first.bias", "score.bias"}


class Router(nn.Linear):
    """A linear layer that returns more than one tensor."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        scores = super().forward(x)
        return scores.sigmoid(), scores


def test_a_linear_layer_with_a_forward_pass_of_its_own_is_changed_by_its_weight() -> None:
    router, x = Router(4, 3), torch.randn(2, 4)
    assert anatomy.read_weights(router) == ["weight"]
    assert anatomy.read_weights(nn.Linear(4, 3)) == []
    model = nn.ModuleDict({"router": router})
    adapter = inject(model, LoRA(targets="router"))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.fill_(0.5)
    _, scores = router(x)
    plain = Router(4, 3)
    plain.load_state_dict({k: v for k, v in router.state_dict().items() if "peft" not in k})
    change = 2 * torch.full((3, 8), 0.5) @ torch.full((8, 4), 0.5)
    torch.testing.assert_close(scores, plain(x)[1] + x @ change.T)


def test_linear_layers_whose_weight_the_parent_reads() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.both, self.called, self.cast = (nn.Linear(4, 4) for _ in range(4))
            self.set = nn.Linear(4, 4)
            self.set.weight = self.called.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.cast(x.to(self.cast.weight.dtype))
            if isinstance(self.called.weight, torch.Tensor):
                x = self.called(self.set(x))
            return self.both(x) @ self.read.weight.T + self.both.weight.sum()

    model = nn.Sequential(Mixer())
    assert anatomy.read_by_parents(model) == {"0.read", "0.both"}
    assert anatomy.read_by_parents(nn.TransformerEncoderLayer(8, 2)) == set()


def test_attention_to_an_encoder_that_is_not_there_is_left_alone(build: Build) -> None:
    settings = build("bart").model.config.to_dict() | {"is_encoder_decoder": False}
    alone = transformers.BartForCausalLM(transformers.BartConfig(**settings))
    idle = anatomy.uncrossed(alone)
    assert idle == tuple(f"model.decoder.layers.{i}.encoder_attn" for i in range(2))
    adapted = [name for name, _ in anatomy.projections(alone)]
    assert adapted
    assert not any("encoder_attn" in name for name in adapted)
    assert not any("encoder_attn" in s.output[0] for s in sublayers.sublayers(alone))
    beside = nn.ModuleDict({"encoder": build("bert_base").model, "decoder": alone})
    for model in (build("bart").model, build("t5").model, beside):
        assert anatomy.uncrossed(model) == ()


class Reader(transformers.LlamaForCausalLM):
    """A text model that registers what reads images behind its layers."""

    def __init__(self, config: Any, tower: nn.Module) -> None:
        super().__init__(config)
        self.model.tower = tower


def test_the_top_is_what_runs_last(build: Build) -> None:
    text, tower = build("llama").model, build("vit").model.vit
    reader = Reader(text.config, tower)
    registered = names(anatomy.layers(reader))
    assert registered[-1].startswith("model.tower")
    assert names(running_order(reader)) == [*registered[2:], *registered[:2]]
    assert above(reader) == ["model.norm.weight"]
    trained = {name.partition(".norm")[0] for name in inject(reader, Freeze(layers=1)).in_place}
    assert {".".join(name.split(".")[:3]) for name in trained} == {"model.layers.1", "model"}
    for name in ("bart", "t5", "swin"):
        model = build(name).model
        assert names(running_order(model)) == names(anatomy.layers(model))
