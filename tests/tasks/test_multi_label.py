import pytest
import torch
from sklearn.metrics import f1_score, precision_recall_fscore_support

from lightning_peft.config import instantiate
from lightning_peft.errors import ConfigError, DataError
from lightning_peft.models import ModelSource
from lightning_peft.tasks.multi_label import MultiLabelClassification

LABELS = ("sad", "short", "true")


class Data:
    labels = LABELS

    def __init__(self, counts=(3, 4, 5)):
        self.counts = counts

    def label_counts(self, split):
        return dict(zip(self.labels, self.counts, strict=True))


@pytest.fixture
def task():
    return MultiLabelClassification(LABELS)


@pytest.fixture
def batch(build):
    return build("bert").inputs | {"labels": torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0]])}


def test_the_loss_is_the_models_own(task, build, batch):
    model = build("bert").model
    model.config.problem_type = "multi_label_classification"
    out = task.step(model, batch)
    torch.testing.assert_close(out.loss, model(**batch).loss)
    assert torch.equal(out.predictions, (model(**batch).logits > 0).long())


def test_predictions_have_the_labels_above_the_threshold(build, batch):
    task = MultiLabelClassification(LABELS, threshold=0.4)
    for row in task.predictions(build("bert").model, batch):
        assert list(row["probabilities"]) == list(LABELS)
        assert row["labels"] == [n for n, p in row["probabilities"].items() if p >= 0.4]


def test_scores_equal_scikit_learns(task):
    gold, chosen = torch.randint(0, 2, (60, 3)), torch.randint(0, 2, (60, 3))
    metrics = task.metrics()
    for rows in torch.arange(60).split(16):
        metrics.update(chosen[rows], gold[rows])
    found = metrics.compute()
    assert found["f1"].item() == pytest.approx(f1_score(gold, chosen, average="micro"))
    assert found["f1_macro"].item() == pytest.approx(f1_score(gold, chosen, average="macro"))
    assert found["exact"].item() == pytest.approx((gold == chosen).all(1).float().mean().item())

    def named(rows):
        return [[n for n, mark in zip(LABELS, row, strict=True) if mark] for row in rows.tolist()]

    scores = task.by_class(named(gold), [{"labels": names} for names in named(chosen)])
    expected = precision_recall_fscore_support(gold, chosen)
    for i, label in enumerate(LABELS):
        assert list(scores[label].values()) == pytest.approx([column[i] for column in expected])


def test_the_head_is_one_for_many_labels(task, minilm_dir):
    model = task.load_model(ModelSource(name=str(minilm_dir)))
    assert model.config.problem_type == "multi_label_classification"
    task.check(model, Data())
    with pytest.raises(DataError, match="but no row has any"):
        task.check(model, Data((0, 0, 0)))


def test_settings_survive_storage_and_are_checked(task):
    again = instantiate(MultiLabelClassification(LABELS, threshold=0.3).to_spec())
    assert (again.labels, again.threshold) == (LABELS, 0.3)
    with pytest.raises(ConfigError, match="`threshold` must be between 0 and 1, but is 1"):
        MultiLabelClassification(threshold=1)
    assert task.example("x", [], {"labels": ["sad"]}).gold == "-"
