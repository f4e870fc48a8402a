"""Tiny models of every architecture, and a sample of them that every method must train.

`python -m tests.zoo.coverage` runs all methods on all of them and prints the table.
"""

import zlib

import pytest
import torch
from torch import nn

from lightning_peft import LoRA
from tests.zoo import HEADS, Unavailable, architectures, build, cells, methods_of, trains
from tests.zoo.build import quiet
from tests.zoo.coverage import METHODS, report, table, total

NOT_YET = ("MambaForCausalLM", "Gemma3ForConditionalGeneration")
"""Methods and architectures that the sample leaves out."""

SAMPLE = (
    ("sequence classification", "AlbertForSequenceClassification"),  # one layer's weights for all
    ("sequence classification", "GPT2ForSequenceClassification"),  # Conv1D, fused projections
    ("causal LM", "OPTForCausalLM"),  # flattens its hidden states
    ("causal LM", "Qwen3MoeForCausalLM"),  # experts
    ("causal LM", "MambaForCausalLM"),  # no attention
    ("causal LM", "Gemma3ForConditionalGeneration"),  # a vision tower that text does not reach
    ("seq2seq", "T5ForConditionalGeneration"),
    ("token classification", "DebertaV2ForTokenClassification"),  # attention of its own
    ("question answering", "BartForQuestionAnswering"),
    ("image classification", "SwinForImageClassification"),  # stages, windows
    ("image classification", "ConvNextForImageClassification"),  # convolutions
    ("image classification", "CLIPForImageClassification"),  # one tower of two
)

COUNTS = {
    "sequence classification": 95,
    "causal LM": 125,
    "seq2seq": 21,
    "token classification": 78,
    "question answering": 64,
    "image classification": 23,
}
"""How many architectures of each head must build at least."""


EVERYWHERE = ("lora",)
"""Methods that must train all of the sample; each of the others meets one of its cells."""


PECULIAR = (("mam", ("causal LM", "Llama4ForCausalLM")),)  # experts that give one list of tokens


def tries() -> list[tuple[str, tuple[str, str]]]:
    """Each method with its cells; which one a method meets depends on nothing but its name."""
    sample = [cell for cell in SAMPLE if cell[1] not in NOT_YET]
    found = list(PECULIAR)
    for method in (name for name in METHODS if name not in NOT_YET):
        one = sample[zlib.crc32(method.encode()) % len(sample)]
        found += [(method, cell) for cell in (sample if method in EVERYWHERE else [one])]
    return found


@pytest.mark.parametrize(
    ("method", "cell"), tries(), ids=lambda given: given if isinstance(given, str) else given[1]
)
def test_a_method_trains_a_sample_of_architectures(method: str, cell: tuple[str, str]) -> None:
    outcome = trains(build(*cell), methods_of(method))
    allowed = ("ok",) if method in EVERYWHERE else ("ok", "refused")
    assert outcome.status in allowed, outcome.message


def test_a_model_is_the_same_in_every_build() -> None:
    first, second = build(*SAMPLE[3]), build(*SAMPLE[3])
    torch.testing.assert_close(first.model.state_dict(), second.model.state_dict(), rtol=0, atol=0)
    assert torch.equal(first.logits(), second.logits())


def test_a_method_that_trains_nothing_fails() -> None:
    cell = build(*SAMPLE[0])
    cell.model.unused = nn.Linear(2, 2)
    outcome = trains(cell, [LoRA(targets="unused")])
    assert outcome.status == "failed"
    assert outcome.idle
    assert "nothing but the head" in outcome.message


def test_what_needs_a_missing_package_is_told() -> None:
    with pytest.raises(Unavailable, match="detectron2"):
        build("sequence classification", "LayoutLMv2ForSequenceClassification")


def test_the_table_counts_what_trains_and_the_report_says_why_not() -> None:
    wanted = [("seq2seq", name) for name in architectures("seq2seq")[:4]]
    outcomes = [
        {"lora": {"status": "ok", "message": "", "idle": []}},
        {"lora": {"status": "refused", "message": "no tokens", "idle": []}},
        {"lora": {"status": "failed", "message": "no gradient: x", "idle": []}},
        {"unavailable": "needs natten"},
    ]
    results = {"/".join(cell): row for cell, row in zip(wanted, outcomes, strict=True)}
    told = table(results, wanted, ["lora"])
    assert "| method | seq2seq (3) |" in told
    assert "| lora | 1 (1 refused, 1 failed) |" in told
    told = total(results, wanted, ["lora"])
    assert told.startswith("Of 3 cells 1 train, 1 are refused")
    told = report(results, wanted, ["lora"])
    for words in ("refused: no tokens", "failed: no gradient: x", "not built here: needs natten"):
        assert f"- {words}\n" in told
    assert f"- `lora`: {wanted[1][1]}" in told


def test_errors_of_one_cause_are_told_once() -> None:
    wanted = [("seq2seq", name) for name in architectures("seq2seq")[:2]]
    results = {
        "/".join(cell): {
            method: {"status": "refused", "message": f"{cell[1]} is odd.", "idle": []}
            for method in ("lora", "vera")
        }
        for cell in wanted
    }
    assert report(results, wanted, ["lora", "vera"]) == (
        f"- refused: ... is odd.\n  - `lora`, `vera`: {wanted[0][1]}, {wanted[1][1]}"
    )


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_every_architecture_builds_and_runs_forward_and_backward(head: str) -> None:
    built, broken = 0, {}
    for cell in cells(head):
        try:
            with quiet():
                one = build(*cell)
                one.model.train()  # some have no loss in eval mode
                one.loss().backward()
                one.model.eval()
                assert one.logits().isfinite().all()
                if one.padded is not None:
                    assert one.logits(one.padded).isfinite().all()
            built += 1
        except Unavailable:
            continue
        except Exception as error:
            broken[cell[1]] = f"{type(error).__name__}: {error}"
    assert not broken
    assert built >= COUNTS[head]
