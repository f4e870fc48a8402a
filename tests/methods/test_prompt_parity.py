"""Prompt tuning and P-tuning compute what peft's do, and are right where peft's are not."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import inject
from lightning_peft.delta import SLOT
from lightning_peft.methods.p_tuning import PTuning
from lightning_peft.methods.prompt_tuning import PromptTuning

peft = pytest.importorskip("peft", reason="peft is not installed: run `pip install '.[dev]'`")

Build = Callable[[str], Any]
TOKENS = 5
IDS = torch.tensor([[5, 9, 33, 12, 7, 41, 8], [11, 3, 60, 5, 28, 14, 9]])
ENCODERS = {"mlp": "MLP", "lstm": "LSTM"}

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(
        OPTConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
            max_position_embeddings=40, dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            word_embed_proj_dim=32,
        )
    )  # fmt: skip


def gemma() -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
            num_key_value_heads=2, intermediate_size=48, max_position_embeddings=40,
            layer_types=["sliding_attention", "full_attention"], sliding_window=8,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


@pytest.fixture
def model(request: pytest.FixtureRequest, build: Build) -> nn.Module:
    """A model in float64 by its name."""
    name, others = request.param, {"opt": opt, "gemma": gemma}
    if name not in others:
        return build(name).model.double()
    torch.manual_seed(0)
    return others[name]().eval().double()


def reference_of(model: nn.Module, task: str, method: Any) -> Any:
    common = {"task_type": task, "num_virtual_tokens": TOKENS, "token_dim": 32}
    common |= {"num_attention_heads": 4, "num_layers": 2}
    if isinstance(method, PromptTuning):
        config = peft.PromptTuningConfig(**common)
    else:
        config = peft.PromptEncoderConfig(
            encoder_reparameterization_type=ENCODERS[method.encoder],
            encoder_hidden_size=method.hidden_size,
            encoder_num_layers=method.layers,
            **common,
        )
    if task == "SEQ_2_SEQ_LM":
        config.num_transformer_submodules = 1
    return peft.get_peft_model(copy.deepcopy(model), config).eval().double()


def same_weights(adapter: Any, reference: Any) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Copy our weights into peft's prompt encoder; return the pairs by our name."""
    theirs = dict(reference.prompt_encoder.default.named_parameters())
    names = {"prompt": "embedding.weight", "inputs": "embedding.weight"}
    pairs = {}
    for name, parameter in adapter.named_parameters().items():
        if SLOT not in name:
            continue
        end = name.rpartition(f"{SLOT}.default_{adapter.methods[0].kind}.")[2]
        end = names.get(end, end.replace("encoder.lstm.", "lstm_head."))
        end = end.replace("encoder.head.", "mlp_head.").replace("encoder.", "mlp_head.")
        pairs[name] = (parameter, theirs.pop(end))
    assert not theirs
    with torch.no_grad():
        for own, their in pairs.values():
            own.normal_(std=0.3)
            their.copy_(own)
    return pairs


def assert_same_gradients(pairs: dict[str, tuple[nn.Parameter, nn.Parameter]]) -> None:
    for name, (own, their) in pairs.items():
        assert own.grad is not None, name
        scale = their.grad.abs().max()
        assert scale > 0, name
        assert (own.grad - their.grad).abs().max() <= 1e-7 * scale, name


METHODS = {
    "prompt": PromptTuning(tokens=TOKENS, layout="peft"),
    "mlp": PTuning(tokens=TOKENS, hidden_size=16, layout="peft"),
    "lstm": PTuning(tokens=TOKENS, hidden_size=16, encoder="lstm", layout="peft"),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("model", ["llama", "gpt2", "opt", "gemma"], indirect=True)
def test_a_decoder_computes_and_writes_what_pefts_does(model: Any, method: Any) -> None:
    reference = reference_of(model, "CAUSAL_LM", method)
    adapter = inject(model, method)
    pairs = same_weights(adapter, reference)
    mask = torch.ones_like(IDS)
    labels = IDS.clone()
    labels[:, 0] = -100  # peft has the last virtual token predict the first word: that one aside
    own = model(input_ids=IDS, attention_mask=mask, labels=labels)
    their = reference(input_ids=IDS, attention_mask=mask, labels=labels)
    torch.testing.assert_close(own.loss, their.loss, rtol=1e-6, atol=0)  # computed in float32
    torch.testing.assert_close(own.logits, their.logits[:, TOKENS:], rtol=1e-7, atol=1e-12)
    for logits in (own.logits, their.logits[:, TOKENS:]):
        logits.square().sum().backward()
    assert_same_gradients(pairs)
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    written = model.generate(input_ids=IDS, **settings)
    assert torch.equal(written, reference.generate(input_ids=IDS, **settings))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("model", ["t5", "bart"], indirect=True)
def test_an_encoder_decoder_computes_what_pefts_does(model: Any, method: Any) -> None:
    reference = reference_of(model, "SEQ_2_SEQ_LM", method)
    pairs = same_weights(inject(model, method), reference)
    mask = torch.ones_like(IDS)
    mask[1, -2:] = 0
    batch = {"input_ids": IDS, "attention_mask": mask, "labels": IDS[:, :4].contiguous()}
    own, their = model(**batch), reference(**batch)
    torch.testing.assert_close(own.logits, their.logits, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(own.loss, their.loss, rtol=1e-6, atol=0)
    for output in (own, their):
        output.logits.square().sum().backward()
    assert_same_gradients(pairs)
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    written = model.generate(input_ids=IDS, **settings)
    assert torch.equal(written, reference.generate(input_ids=IDS, **settings))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("model", ["bert", "roberta", "distilbert"], indirect=True)
def test_an_encoders_head_reads_what_pefts_does(model: Any, method: Any) -> None:
    reference = reference_of(model, "SEQ_CLS", method)
    pairs = same_weights(inject(model, method, head=False), reference)
    mask = torch.ones_like(IDS)
    mask[1, -2:] = 0
    own, their = (m(input_ids=IDS, attention_mask=mask).logits for m in (model, reference))
    torch.testing.assert_close(own, their, rtol=1e-7, atol=1e-12)
    for logits in (own, their):
        logits.square().sum().backward()
    assert_same_gradients(pairs)


@pytest.mark.parametrize("model", ["llama", "gpt2", "opt", "gemma"], indirect=True)
def test_left_padding_changes_nothing_where_it_does_in_peft(model: Any) -> None:
    method = METHODS["prompt"]
    adapter = inject(model, method)
    with torch.no_grad():
        adapter.parameters()[0].normal_()
    padded, mask = left_padded(IDS[:1], 3)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # as `generate` gives them
    alone = model(input_ids=IDS[:1]).logits
    beside = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(beside, alone, rtol=1e-7, atol=1e-12)


def left_padded(ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    padding = torch.zeros(len(ids), count, dtype=torch.long)
    mask = torch.cat([padding, torch.ones_like(ids)], 1)
    return torch.cat([padding, ids], 1), mask
