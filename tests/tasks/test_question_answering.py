import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    ModernBertConfig,
    ModernBertForQuestionAnswering,
)
from transformers.modeling_outputs import QuestionAnsweringModelOutput

from lightning_peft import LoRA, inject
from lightning_peft.baseline import frozen_baselines
from lightning_peft.config import instantiate
from lightning_peft.data.windows import IGNORED, WindowCollator
from lightning_peft.errors import ConfigError, DataError
from lightning_peft.models import ModelSource
from lightning_peft.tasks.question_answering import QuestionAnswering

CONTEXTS = ["Ada lived in London.", "Rome is old."]
OUT = (-1, -1)
TINY = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "num_labels": 2,
}  # fmt: skip


class Data:
    """What the task asks of a data module."""

    unanswerable = True


class Fixed(nn.Module):
    """Answers each token by its number: how sure it is that an answer begins and ends there."""

    def __init__(self, starts, ends):
        super().__init__()
        self.starts, self.ends = starts, ends

    def forward(self, input_ids, attention_mask):
        logits = torch.zeros(2, *input_ids.shape)
        for i, sure in enumerate((self.starts, self.ends)):
            for token, value in sure.items():
                logits[i] += value * (input_ids == token)
        return QuestionAnsweringModelOutput(start_logits=logits[0], end_logits=logits[1])


@pytest.fixture
def rows():
    """Two questions; the first is of two windows, of which the second has the answer."""
    return [
        {
            "input_ids": [[1, 40, 2, 5, 6, 7, 2], [1, 40, 2, 7, 8, 9, 2]],
            "offsets": [
                [OUT, OUT, OUT, (0, 3), (4, 9), (10, 12), OUT],
                [OUT, OUT, OUT, (10, 12), (13, 19), (19, 20), OUT],
            ],
            "null": [0, 0],
            "labels": [(0, 0), (4, 4)],
            "context": CONTEXTS[0],
            "answers": ["London", "London."],
        },
        {
            "input_ids": [[1, 41, 2, 10, 11, 2]],
            "offsets": [[OUT, OUT, OUT, (0, 4), (5, 7), OUT]],
            "null": [0],
            "labels": [(IGNORED, IGNORED)],
            "context": CONTEXTS[1],
            "answers": ["Rome"],
        },
    ]


@pytest.fixture(params=["right", "left"])
def batch(rows, request):
    return WindowCollator(padding=0, type_padding=0, side=request.param)(rows)


@pytest.fixture
def task():
    return QuestionAnswering(unanswerable=False)


def test_the_loss_is_taken_over_what_can_be_the_answer(task, batch):
    generator = torch.Generator().manual_seed(0)
    starts, ends = (
        {token: torch.randn((), generator=generator).item() for token in range(64)}
        for _ in range(2)
    )
    loss = task.step(Fixed(starts, ends), batch).loss
    parts = []
    for logits in (starts, ends):
        for tokens, target in (([1, 5, 6, 7], 1), ([1, 7, 8, 9], 8)):
            scores = torch.tensor([logits[token] for token in tokens])
            parts.append(scores.logsumexp(0) - logits[target])
    torch.testing.assert_close(loss, torch.stack(parts).mean())


def test_a_batch_that_only_cuts_its_answers_has_no_loss(task, rows):
    batch = WindowCollator(padding=0, type_padding=0, side="right")(rows[1:])
    model = BertForQuestionAnswering(BertConfig(**TINY))
    loss = task.step(model, batch).loss
    assert loss == 0
    loss.backward()
    assert model.qa_outputs.weight.grad.abs().sum() == 0


def test_the_best_span_of_all_windows_is_the_answer(task, batch):
    model = Fixed({5: 2.0, 8: 3.0, 11: 1.0, 40: 99.0}, {6: 2.0, 9: 3.0, 11: 1.0, 41: 99.0})
    out = task.step(model, batch)
    assert out.predictions == ["London.", "is"]
    assert out.targets == [["London", "London."], ["Rome"]]
    found = task.metrics()
    found.update(out.predictions, out.targets)
    assert found.compute() == {"exact_match": 0.5, "f1": 0.5}


def test_predictions_tell_characters_and_probabilities(task, batch):
    model = Fixed({5: 2.0, 8: 3.0}, {6: 2.0, 8: 1.0, 9: 3.0})
    first, second = task.predictions(model, batch)
    assert {k: first[k] for k in ("answer", "start", "end")} == {
        "answer": "London.", "start": 13, "end": 20,
    }  # fmt: skip
    assert [one["answer"] for one in first["n_best"][:2]] == ["London.", "Ada lived"]
    assert len(first["n_best"]) == 5
    assert first["score"] == first["n_best"][0]["score"]
    # Each window has six spans; in each, those that begin or end with a token said above.
    spans = torch.tensor([2.0, 4.0, 2.0, 2.0, 0, 0, 0, 1.0, 3.0, 4.0, 6.0, 3.0])
    assert first["score"] == pytest.approx((6 - spans.logsumexp(0)).exp().item())
    assert "no_answer" not in first
    assert sum(one["score"] for one in second["n_best"]) == pytest.approx(1)
    del batch["labels"], batch["row_answers"]
    assert task.predictions(model, batch)[0] == first


def test_no_answer_wins_where_its_score_is_the_higher_in_every_window(batch):
    model = Fixed({1: 3.0, 8: 1.0, 10: 4.0}, {1: 3.0, 8: 1.0, 10: 4.0})
    task = QuestionAnswering(unanswerable=True)
    first, second = task.predictions(model, batch)
    assert (first["answer"], first["start"], first["end"]) == ("", -1, -1)
    assert first["score"] == first["no_answer"] > 0.5
    assert first["n_best"][0]["answer"] == "London"
    assert second["answer"] == "Rome"
    assert second["score"] + second["no_answer"] < 1
    assert QuestionAnswering(unanswerable=True, null_threshold=5.0).predictions(model, batch)[0][
        "answer"
    ] == "London"  # fmt: skip
    assert QuestionAnswering(unanswerable=False).step(model, batch).predictions[0] == "London"


def test_scores_with_and_without_an_answer_are_told(task):
    targets = [["Rome"], [], []]
    predictions = [{"answer": "Rome"}, {"answer": ""}, {"answer": "x"}]
    assert task.by_class(targets, predictions) == {
        "answerable": {"exact_match": 1, "f1": 1, "questions": 1},
        "unanswerable": {"exact_match": 0.5, "f1": 0.5, "questions": 2},
    }
    assert task.by_class(targets[:1], predictions[:1]) == {}


def test_the_report_shows_question_and_answers(task):
    shown = task.example(
        {"question": "Where?", "context": "..."}, ["in Rome", "Rome"],
        {"answer": "the Rome.", "score": 0.5},
    )  # fmt: skip
    assert shown.right
    assert shown.text == "Where?"
    wrong = task.example({"question": "Who?"}, [], {"answer": "Ada", "score": 0.5})
    assert (wrong.gold, wrong.predicted, wrong.right) == ("-", "Ada", False)


def test_whether_there_may_be_no_answer_comes_from_the_data_and_is_stored():
    task = QuestionAnswering(longest=12).connect(Data())
    assert task.unanswerable
    again = instantiate(task.to_spec())
    assert (again.unanswerable, again.longest) == (True, 12)
    assert not QuestionAnswering(unanswerable=False).connect(Data()).unanswerable


def llama():
    return LlamaForQuestionAnswering(LlamaConfig(**TINY, num_key_value_heads=2))


def modern_bert():
    special = {"pad_token_id": 0, "bos_token_id": 1, "cls_token_id": 1, "sep_token_id": 2}
    return ModernBertForQuestionAnswering(ModernBertConfig(**TINY, **special, eos_token_id=2))


@pytest.mark.parametrize("build_model", [llama, modern_bert])
def test_other_models_learn_with_lora(task, rows, build_model):
    model = build_model().eval()
    inject(model, LoRA(r=4))
    side = "left" if build_model is llama else "right"
    batch = WindowCollator(padding=0, type_padding=0, side=side)(rows)
    for name, parameter in model.named_parameters():
        if name.startswith(("qa_outputs", "head", "classifier")):
            parameter.requires_grad_()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    first = task.step(model, batch).loss
    for _ in range(120):
        optimizer.zero_grad()
        loss = task.step(model, batch).loss
        loss.backward()
        optimizer.step()
    assert loss < first / 3
    assert task.step(model, batch).predictions[0] == "London"


def test_the_head_has_two_outputs_whatever_the_base_had(task, minilm_dir):
    model = task.load_model(ModelSource(name=str(minilm_dir)))
    assert model.qa_outputs.out_features == 2
    assert set(model.fresh_parameters) == {"qa_outputs.weight", "qa_outputs.bias"}


def test_a_decoder_keeps_its_pretrained_weights(task, tmp_path):
    pretrained = LlamaForCausalLM(LlamaConfig(**TINY, num_key_value_heads=2))
    pretrained.save_pretrained(tmp_path)
    model = task.load_model(ModelSource(name=str(tmp_path)))
    assert set(model.fresh_parameters) == {"qa_outputs.weight", "qa_outputs.bias"}
    found = model.transformer.state_dict()
    for name, tensor in pretrained.model.state_dict().items():
        torch.testing.assert_close(found[name], tensor)


def test_models_and_settings_that_do_not_fit_are_refused(task, build, batch):
    with pytest.raises(ConfigError, match="`start_logits` and `end_logits`, but BertForSequ"):
        task.step(build("bert").model, batch)
    with pytest.raises(ConfigError, match="`longest` must be at least 1, but is 0"):
        QuestionAnswering(longest=0)
    del batch["labels"]
    with pytest.raises(DataError, match="a batch must have `labels`"):
        task.step(build("bert").model, batch)


def test_the_head_alone_is_a_baseline(task):
    from datasets import Dataset
    from torch.utils.data import DataLoader

    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(48):
        ids = torch.randint(5, 60, (4,), generator=generator).tolist()
        place = i % 4
        ids[place] = 63
        context = " ".join(f"{token:02}" for token in ids)
        offsets = [(3 * k, 3 * k + 2) for k in range(4)]
        label = (place + 1, place + 1)
        rows.append(
            {"input_ids": [[1, *ids]], "offsets": [[OUT, *offsets]], "null": [0], "labels": [label],
             "context": context, "answers": ["63"]}
        )  # fmt: skip
    loader = DataLoader(
        Dataset.from_list(rows), 8,
        collate_fn=WindowCollator(padding=0, type_padding=0, side="right"),
    )  # fmt: skip
    model = BertForQuestionAnswering(BertConfig(**TINY)).eval()
    (found,) = frozen_baselines(model, task, loader, loader, progress=False, pooled=False)
    assert found.trained == 32 * 2 + 2
    assert found.validation["exact_match"] > 0.8
