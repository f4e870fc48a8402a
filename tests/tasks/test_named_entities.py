import copy

import pytest
import torch
from seqeval.metrics import f1_score, precision_score, recall_score
from torch import nn
from transformers import BertConfig, BertForTokenClassification

from lightning_peft.baseline import frozen_baselines
from lightning_peft.config import instantiate
from lightning_peft.data.entities import IGNORED, WordCollator
from lightning_peft.errors import ConfigError, DataError
from lightning_peft.models import ModelSource
from lightning_peft.tasks.named_entities import EntityScore, NamedEntities, entity_scores, spans

TAGS = ("O", "B-a", "I-a", "B-b", "I-b")
WORDS = [["Ada", "Lovelace", "of", "Paris"], ["Hi"]]


class Data:
    """What the task asks of a data module."""

    labels = TAGS


@pytest.fixture
def task():
    return NamedEntities(TAGS)


@pytest.fixture
def model():
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, num_labels=5,
    )  # fmt: skip
    return BertForTokenClassification(config).eval()


def collated(rows):
    return WordCollator(padding=0, side="right")(rows)


@pytest.fixture
def batch():
    """Two rows; the first is of two pieces, and its second word of two sub-words."""
    rows = [
        {
            "input_ids": [[1, 5, 6, 7, 2], [1, 8, 9, 2]],
            "words": [[-1, 0, 1, -1, -1], [-1, 2, 3, -1]],
            "length": 4,
            "tags": [1, 2, 0, 3],
        },
        {"input_ids": [[1, 10, 2]], "words": [[-1, 0, -1]], "length": 1, "tags": [0]},
    ]
    return collated(rows)


class Fixed(nn.Module):
    """Answers each token by its number: the tag and how sure it is."""

    def __init__(self, answers):
        super().__init__()
        self.answers = answers

    def forward(self, input_ids, attention_mask):
        logits = torch.zeros(*input_ids.shape, 5)
        for token, (tag, sure) in self.answers.items():
            logits[..., tag] += sure * (input_ids == token)
        return logits


def test_the_loss_is_the_models_own(task, model, batch):
    out = task.step(model, batch)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    torch.testing.assert_close(out.loss, model(**inputs).loss)
    out.loss.backward()
    assert model.classifier.weight.grad.abs().sum() > 0


def test_words_are_put_together_from_sub_words_and_pieces(task, batch):
    model = Fixed({5: (1, 3.0), 6: (2, 2.0), 7: (4, 9.0), 9: (3, 5.0)})
    out = task.step(model, batch)
    assert out.predictions.tolist() == [[1, 2, 0, 3], [0, 0, 0, 0]]
    assert out.targets.tolist() == [[1, 2, 0, 3], [0, IGNORED, IGNORED, IGNORED]]


def test_predictions_are_entities_with_their_words(task, batch):
    model = Fixed({5: (1, 3.0), 6: (2, 2.0), 9: (3, 5.0)})
    rows = task.predictions(model, batch)
    first, second = map(task.readable, WORDS, rows)
    assert first["labels"] == ["B-a", "I-a", "O", "B-b"]
    assert [(one["text"], one["type"]) for one in first["entities"]] == [
        ("Ada Lovelace", "a"),
        ("Paris", "b"),
    ]
    sure = [torch.tensor([s, 0, 0, 0, 0.0]).softmax(0)[0].item() for s in (3.0, 2.0, 5.0)]
    assert first["entities"][0]["score"] == pytest.approx((sure[0] + sure[1]) / 2)
    assert first["entities"][1]["score"] == pytest.approx(sure[2])
    assert second == {"labels": ["O"], "entities": []}
    del batch["labels"], batch["row_tags"]
    assert task.predictions(model, batch) == rows


def test_a_word_of_which_no_token_is_left_is_no_entity(task):
    row = {"input_ids": [[1, 2]], "words": [[-1, -1]], "length": 2, "tags": [1, 0]}
    batch = collated([row])
    out = task.step(Fixed({1: (3, 9.0)}), batch)
    assert out.predictions.tolist() == [[0, 0]]
    assert out.targets.tolist() == [[1, 0]]


def test_metrics_equal_seqevals_over_batches(task):
    generator = torch.Generator().manual_seed(3)
    metrics, gold, chosen = task.metrics(), [], []
    for width in (9, 4, 13):
        targets = torch.randint(0, 5, (8, width), generator=generator)
        keep = torch.rand(8, width, generator=generator) < 0.5
        predictions = targets.where(keep, torch.randint(0, 5, (8, width), generator=generator))
        lengths = torch.randint(1, width + 1, (8,), generator=generator)
        for i, length in enumerate(lengths.tolist()):
            targets[i, length:] = IGNORED
            gold.append([TAGS[t] for t in targets[i, :length]])
            chosen.append([TAGS[t] for t in predictions[i, :length]])
        metrics.update(predictions, targets)
    found = metrics.compute()
    assert found["f1"].item() == pytest.approx(f1_score(gold, chosen))
    assert found["precision"].item() == pytest.approx(precision_score(gold, chosen))
    assert found["recall"].item() == pytest.approx(recall_score(gold, chosen))


def test_a_metric_starts_anew_and_copies():
    metric = EntityScore(TAGS, "f1")
    metric.update(torch.tensor([[1]]), torch.tensor([[1]]))
    assert copy.deepcopy(metric).compute() == 1
    metric.reset()
    metric.update(torch.tensor([[0]]), torch.tensor([[1]]))
    assert metric.compute() == 0


def test_scores_by_type_count_whole_entities(task):
    targets = [["B-a", "I-a", "O", "B-b"], ["B-a"]]
    predictions = [{"labels": ["B-a", "O", "O", "B-b"]}, {"labels": ["B-a"]}]
    assert task.by_class(targets, predictions) == {
        "a": {"precision": 0.5, "recall": 0.5, "f1": 0.5, "entities": 2},
        "b": {"precision": 1, "recall": 1, "f1": 1, "entities": 1},
    }


def test_nothing_found_and_nothing_there_counts_nothing():
    assert entity_scores([["O"]], [["O"]])["all"]["f1"] == 0


def test_an_i_without_its_b_begins_an_entity():
    assert spans(["O", "I-a", "I-a", "I-b", "B-b"]) == [("a", 1, 3), ("b", 3, 4), ("b", 4, 5)]


def test_the_report_shows_entities_as_people_write_them(task):
    shown = task.example(WORDS[0], ["B-a", "I-a", "O", "O"], {"labels": ["O", "O", "O", "B-b"]})
    assert (shown.text, shown.gold) == ("Ada Lovelace of Paris", "Ada Lovelace [a]")
    assert shown.predicted == "Paris [b]"
    assert not shown.right
    assert task.example(["Hi"], ["O"], {"labels": ["O"]}) is None


def test_the_tags_come_from_the_data_and_survive_storage(model):
    task = NamedEntities()
    task.check(model, Data())
    assert task.labels == TAGS
    assert instantiate(task.to_spec()).labels == TAGS
    with pytest.raises(DataError, match=r"set `data\.types=\[z\]`"):
        NamedEntities(["O", "B-z", "I-z"]).connect(Data())


def test_the_head_gets_the_tags(task, minilm_dir):
    model = task.load_model(ModelSource(name=str(minilm_dir)))
    assert model.config.id2label == dict(enumerate(TAGS))
    model.config.num_labels = 3
    with pytest.raises(DataError, match=r"as many as the model has outputs \(3\)"):
        task.check(model, Data())


def test_models_and_settings_that_do_not_fit_are_refused(task, build, batch):
    with pytest.raises(ConfigError, match=r"BertForSequenceClassification returns \(3, 3\)"):
        task.step(build("bert").model, batch)
    with pytest.raises(ConfigError, match=r"call `connect\(data\)` first"):
        NamedEntities().metrics()
    with pytest.raises(ConfigError, match="must be O and B-<type>"):
        NamedEntities(["a", "b"])
    del batch["labels"]
    with pytest.raises(DataError, match="a batch must have `labels`"):
        task.step(build("bert").model, batch)


def test_the_head_alone_is_a_baseline(task, model):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(48):
        ids = torch.randint(5, 60, (4,), generator=generator).tolist()
        tags = [1 if token % 2 else 0 for token in ids]
        rows.append({"input_ids": [ids], "words": [[0, 1, 2, 3]], "length": 4, "tags": tags})
    from datasets import Dataset
    from torch.utils.data import DataLoader

    loader = DataLoader(
        Dataset.from_list(rows), 8, collate_fn=WordCollator(padding=0, side="right")
    )
    (found,) = frozen_baselines(model, task, loader, loader, progress=False, pooled=False)
    assert found.trained == 32 * 5 + 5
    assert found.validation["f1"] > 0.5
