import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_peft import baseline
from lightning_peft.baseline import frozen_baselines, logistic_regression
from lightning_peft.data.classification import ClassificationData
from lightning_peft.errors import ConfigError
from lightning_peft.models import ModelSource
from lightning_peft.tasks.sequence_classification import SequenceClassification

TASK = SequenceClassification(["even", "odd", "third"])


class Rows(Dataset):
    """Token numbers whose label the first of them tells."""

    def __init__(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        self.rows = []
        for _ in range(count):
            length = int(torch.randint(3, 12, (), generator=generator))
            ids = torch.randint(3, 64, (length,), generator=generator)
            self.rows.append({"input_ids": ids, "labels": ids[0] % 3})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        return [row[key] for row in self.rows] if isinstance(key, str) else self.rows[key]


def pad(rows):
    ids = nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    labels = torch.stack([row["labels"] for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def loader(count, seed, shuffle=False):
    return DataLoader(Rows(count, seed), batch_size=8, collate_fn=pad, shuffle=shuffle)


@pytest.fixture
def loaders():
    return {
        "train": loader(64, 0, shuffle=True),
        "validation": loader(40, 1),
        "test": loader(48, 2),
    }


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(baseline, "_EPOCHS", 3)
    monkeypatch.setattr(baseline, "_RATES", (1e-3, 1e-2))


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "llama_classifier"])
def test_the_model_is_left_as_it_was(build, loaders, quick, name):
    model = build(name).model
    model.train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    found = frozen_baselines(model, TASK, **loaders, progress=False)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert "forward" not in vars(model.base_model)
    assert all(parameter.grad is None for parameter in model.base_model.parameters())
    assert len(found) == 2
    assert found[0].validation["accuracy"] >= found[1].validation["accuracy"]


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "gpt2_classifier"])
def test_cached_outputs_give_the_models_own_predictions(build, name):
    model = build(name).model
    features = baseline._features(model, model.base_model, loader(20, 3), "t", progress=False)
    with torch.no_grad(), baseline._replay(model.base_model, iter(features.outputs)):
        cached = [model(input_ids=b["input_ids"]).logits for b in features.batches]
    with torch.no_grad():
        own = [
            model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits
            for b in features.batches
        ]
    for one, other in zip(cached, own, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("name", "tokens"), [("bert", 0), ("distilbert", 1), ("gpt2_classifier", None)]
)
def test_only_what_the_head_reads_is_kept(build, name, tokens):
    model = build(name).model
    features = baseline._features(model, model.base_model, loader(20, 3), "t", progress=False)
    for batch, output in zip(features.batches, features.outputs, strict=True):
        expected = batch["input_ids"].shape[1] if tokens is None else tokens
        assert output.last_hidden_state.shape[1] == expected


def test_features_are_means_over_the_tokens_that_are_no_padding(build):
    model = build("bert").model
    features = baseline._features(model, model.base_model, loader(20, 3), "t", progress=False)
    rows = Rows(20, 3).rows
    with torch.no_grad():
        alone = [model.bert(row["input_ids"][None]).last_hidden_state.mean(1) for row in rows]
    torch.testing.assert_close(features.mean, torch.cat(alone))
    assert torch.equal(features.targets, torch.stack([row["labels"] for row in rows]))


def test_logistic_regression_equals_scikit_learns():
    features = torch.randn(120, 7, dtype=torch.float64)
    targets = (features[:, 0] + torch.randn(120) > 0).long() + (features[:, 1] > 1).long()
    for penalty in (1e-3, 1e-1):
        weights, biases = logistic_regression(features, targets, penalty)
        other = LogisticRegression(C=1 / (penalty * 120), tol=1e-10, max_iter=10_000)
        other.fit(features.numpy(), targets.numpy())
        ours = (features @ weights.T + biases).softmax(-1)
        expected = torch.from_numpy(other.predict_proba(features.numpy()))
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_the_choice_is_made_on_validation_alone(build, loaders, quick):
    model = build("bert").model
    with_test = frozen_baselines(model, TASK, **loaders, progress=False)
    del loaders["test"]
    without = frozen_baselines(model, TASK, **loaders, progress=False)
    assert [(b.name, b.setting, b.validation) for b in with_test] == [
        (b.name, b.setting, b.validation) for b in without
    ]
    assert all(b.test == {} for b in without)
    assert all(set(b.test) == {"accuracy", "f1"} for b in with_test)


def test_a_learnable_rule_is_learnt(monkeypatch):
    monkeypatch.setattr(baseline, "_RATES", (1e-2,))
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, num_labels=3,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    with torch.no_grad():  # the first token's number, one-hot, is what the head reads
        model.bert.embeddings.word_embeddings.weight.copy_(8 * torch.eye(64))
        layer = model.bert.encoder.layer[0]
        layer.attention.output.dense.weight.zero_()
        layer.output.dense.weight.zero_()
        model.bert.pooler.dense.weight.copy_(torch.eye(64))
    found = frozen_baselines(
        model, TASK, loader(600, 0, shuffle=True), loader(100, 1), loader(100, 2), progress=False
    )
    assert found[0].name == "frozen base + tuned head"
    assert found[0].test["accuracy"] > 0.9
    assert found[0].trained == 64 * 3 + 3
    assert found[1].trained == 64 * 3 + 3


@pytest.mark.parametrize(
    ("name", "message"),
    [("mlp", "MLP has no `base_model` inside"), ("bert_base", "BertModel has no `base_model`")],
)
def test_a_model_without_base_or_head_is_refused(build, loaders, name, message):
    with pytest.raises(ConfigError, match=message):
        frozen_baselines(build(name).model, TASK, **loaders, progress=False)


def test_real_reviews(minilm_dir, quick):
    source = ModelSource(name=str(minilm_dir))
    data = ClassificationData(source="reviews", max_length=24, limit=120)
    data.connect(source.tokenizer())
    task = SequenceClassification().connect(data)
    model = task.load_model(source)
    data.setup("test")
    best, other = frozen_baselines(
        model,
        task,
        data.train_dataloader(),
        data.val_dataloader(),
        data.test_dataloader(),
        progress=False,
    )
    assert best.validation["accuracy"] >= other.validation["accuracy"] > 0.5
    assert {best.trained, other.trained} == {770}
