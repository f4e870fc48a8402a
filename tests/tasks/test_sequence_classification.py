import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support
from torch import nn

from lightning_peft.config import instantiate
from lightning_peft.errors import ConfigError, DataError
from lightning_peft.models import ModelSource
from lightning_peft.tasks.sequence_classification import SequenceClassification

LABELS = ("bad", "fair", "good")


class Data:
    """What the task asks of a data module."""

    def __init__(self, labels=LABELS, counts=(3, 4, 5)):
        self.labels, self.counts = labels, counts

    def label_counts(self, split):
        return dict(zip(self.labels, self.counts, strict=True))


@pytest.fixture
def task():
    return SequenceClassification(LABELS)


@pytest.fixture
def batch(build):
    return build("bert").inputs | {"labels": torch.tensor([2, 0, 1])}


def test_the_loss_and_the_predictions_are_the_models_own(task, build, batch):
    model = build("bert").model
    out = task.step(model, batch)
    expected = model(**batch)
    torch.testing.assert_close(out.loss, expected.loss)
    assert torch.equal(out.predictions, expected.logits.argmax(-1))
    assert torch.equal(out.targets, batch["labels"])
    out.loss.backward()
    assert model.classifier.weight.grad.abs().sum() > 0


def test_predictions_are_readable_rows(task, build, batch):
    model = build("bert").model
    rows = task.predictions(model, {k: v for k, v in batch.items() if k != "labels"})
    assert rows == task.predictions(model, batch)
    for row in rows:
        assert sum(row["probabilities"].values()) == pytest.approx(1)
        assert row["score"] == max(row["probabilities"].values())
        assert row["probabilities"][row["label"]] == row["score"]


def test_half_precision_logits_are_compared_in_single(task, build, batch):
    model = build("bert").model.bfloat16()
    assert task.step(model, batch).loss.dtype is torch.float32


def test_metrics_equal_scikit_learns_over_batches(task):
    predictions = torch.randint(0, 3, (90,))
    targets = torch.randint(0, 3, (90,))
    metrics = task.metrics()
    for chunk in torch.arange(90).split(32):
        metrics.update(predictions[chunk], targets[chunk])
    values = metrics.compute()
    assert values["accuracy"].item() == pytest.approx(accuracy_score(targets, predictions))
    assert values["f1"].item() == pytest.approx(f1_score(targets, predictions, average="macro"))


def test_the_report_equals_scikit_learns(task):
    predictions, targets = torch.randint(0, 3, (90,)), torch.randint(0, 3, (90,))
    rows = task.report(predictions, targets)
    expected = precision_recall_fscore_support(targets, predictions)
    assert [row["label"] for row in rows] == list(LABELS)
    for i, name in enumerate(("precision", "recall", "f1", "texts")):
        assert [row[name] for row in rows] == pytest.approx(list(expected[i]))


def test_a_label_that_never_occurs_counts_nothing(task):
    rows = task.report(torch.tensor([0, 0]), torch.tensor([0, 2]))
    assert rows[1] == {"label": "fair", "precision": 0, "recall": 0, "f1": 0, "texts": 0}


def test_the_labels_come_from_the_data_and_survive_storage():
    task = SequenceClassification().connect(Data())
    assert task.labels == LABELS
    again = instantiate(task.to_spec())
    assert isinstance(again, SequenceClassification)
    assert again.labels == LABELS
    assert instantiate(SequenceClassification().to_spec()).labels is None


def test_labels_of_task_and_data_must_agree_in_order(task):
    with pytest.raises(DataError, match=r"set `data.labels=\[bad,fair,good\]`"):
        task.connect(Data(("fair", "bad", "good")))


def test_unknown_labels_are_refused_with_the_remedy():
    with pytest.raises(ConfigError, match=r"call `connect\(data\)` first"):
        SequenceClassification().metrics()
    with pytest.raises(ConfigError, match=r"two or more names, but is \['one'\]"):
        SequenceClassification(["one"])


def test_the_head_gets_the_labels(task, minilm_dir):
    model = task.load_model(ModelSource(name=str(minilm_dir)))
    assert model.config.id2label == dict(enumerate(LABELS))
    assert model.classifier.out_features == 3
    task.check(model, Data())


def test_a_decoder_learns_which_token_pads(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({"<end>": 5, "tea": 1}, unk_token="<end>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(tmp_path)
    task = SequenceClassification(["a", "b"])
    model = task.load_model(ModelSource(name=str(tmp_path)))
    assert model.config.pad_token_id == 5
    ids = torch.tensor([[1, 2, 5], [1, 2, 3]])
    batch = {"input_ids": ids, "attention_mask": (ids != 5).long()}
    short = {name: value[:1, :2] for name, value in batch.items()}
    alone, together = task.predictions(model, short)[0], task.predictions(model, batch)[0]
    assert alone["score"] == pytest.approx(together["score"], abs=1e-6)


def test_labels_that_do_not_match_the_head_are_refused(build):
    model = build("bert").model
    with pytest.raises(DataError, match=r"as many as the model has outputs \(3\), but is a, b"):
        SequenceClassification(["a", "b"]).check(model, Data(("a", "b"), (1, 1)))


def test_a_trained_heads_own_order_is_kept(build, task):
    model = build("bert").model
    task.check(model, Data())
    model.config.id2label = {0: "good", 1: "fair", 2: "bad"}
    with pytest.raises(DataError, match=r"`data.labels` must be in the order of .*good, fair, bad"):
        task.check(model, Data())


def test_one_class_in_training_is_refused(build, task):
    with pytest.raises(DataError, match=r"all 7 rows have \['good'\] instead"):
        task.check(build("bert").model, Data(counts=(0, 0, 7)))


def test_a_model_without_suitable_logits_is_refused(task, build, batch):
    with pytest.raises(ConfigError, match="BertModel returns None instead"):
        task.step(build("bert_base").model, batch)

    class PerToken(nn.Module):
        def forward(self, input_ids, **others):
            return torch.zeros(*input_ids.shape, 3)

    with pytest.raises(ConfigError, match=r"PerToken returns \(3, 7, 3\) instead"):
        task.step(PerToken(), batch)


def test_a_plain_tensor_is_taken_for_the_logits(task, batch):
    class Plain(nn.Module):
        def forward(self, input_ids, **others):
            return nn.functional.one_hot(input_ids[:, 0] % 3, 3).float()

    out = task.step(Plain(), batch)
    assert torch.equal(out.predictions, batch["input_ids"][:, 0] % 3)


def test_a_batch_without_labels_has_no_loss(task, build, batch):
    del batch["labels"]
    with pytest.raises(DataError, match="a batch must have `labels`, but has input_ids, attention"):
        task.step(build("bert").model, batch)


def test_balanced_weights_give_every_label_the_same_total(build, batch):
    task = SequenceClassification(class_weights="balanced").connect(Data(counts=(2, 4, 6)))
    assert task.class_weights == {"bad": 2.0, "fair": 1.0, "good": pytest.approx(2 / 3)}
    model = build("bert").model
    logits = model(**batch).logits
    weights = torch.tensor(list(task.class_weights.values()))
    expected = nn.functional.cross_entropy(logits, batch["labels"], weights)
    torch.testing.assert_close(task.step(model, batch).loss, expected)
    assert instantiate(task.to_spec()).class_weights == task.class_weights


def test_weights_are_for_the_labels_there_are():
    task = SequenceClassification(class_weights={"bad": 1, "good": 2})
    with pytest.raises(DataError, match=r"`class_weights` must be given for each label \(bad, f"):
        task.connect(Data())
    with pytest.raises(ConfigError, match="`class_weights` must be 0 or more"):
        SequenceClassification(class_weights={"bad": -1.0})
    assert SequenceClassification(class_weights={0: 1, 1: 2}).class_weights == {"0": 1.0, "1": 2.0}
