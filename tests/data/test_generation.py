import json
import pickle

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from lightning_peft.data.generation import GenerationData
from lightning_peft.data.text_pairs import IGNORED, PairCollator, TextPairs
from lightning_peft.errors import ConfigError, DataError

WORDS = ["<pad>", "</s>", "<s>", "<unk>", "Put", ":", "a", "b", "c", "d", "e", "x", "y", "z"]


@pytest.fixture
def tokenizer():
    """One that knows a few words, and ends texts by itself."""
    tool = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tool.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tool.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tool, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_max_length=512,
    )  # fmt: skip


def numbers(text):
    return [WORDS.index(word) for word in text.split()]


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("id,source,target\n1,a b c,x y\n2,a,x\n3,b c,y z\n", encoding="utf-8")
    return str(path)


def lines(tmp_path, **sides):
    for side, text in sides.items():
        (tmp_path / f"new.{side}").write_text(text, encoding="utf-8")
    return {side: str(tmp_path / f"new.{side}") for side in sides}


def test_a_causal_model_reads_the_prompt_and_learns_the_target_alone(table, tokenizer):
    data = GenerationData(path={"test": table}, prompt="Put {source} :").connect(tokenizer)
    data.setup("test")
    (batch,) = data.test_dataloader()
    assert batch["input_ids"].tolist() == [
        numbers("<s> Put a b c : x y </s>"),
        numbers("<s> Put a : x </s> <pad> <pad> <pad>"),
        numbers("<s> Put b c : y z </s> <pad>"),
    ]
    assert batch["labels"].tolist() == [
        [IGNORED] * 6 + numbers("x y </s>"),
        [IGNORED] * 4 + numbers("x </s>") + [IGNORED] * 3,
        [IGNORED] * 5 + numbers("y z </s>") + [IGNORED],
    ]
    assert batch["attention_mask"].sum(1).tolist() == [9, 6, 8]


def test_to_answer_a_causal_model_reads_from_the_left(table, tokenizer):
    data = GenerationData(path={"predict": table}, prompt="Put {source} :").connect(tokenizer)
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert batch["input_ids"].tolist() == [
        numbers("<s> Put a b c :"),
        numbers("<pad> <pad> <s> Put a :"),
        numbers("<pad> <s> Put b c :"),
    ]
    assert batch["attention_mask"].tolist()[1] == [0, 0, 1, 1, 1, 1]
    assert set(batch) == {"input_ids", "attention_mask"}


def test_an_encoder_decoder_reads_the_text_and_writes_the_target(table, tokenizer):
    data = GenerationData(path={"test": table}).connect(tokenizer, encoder_decoder=True)
    data.setup("test")
    (batch,) = data.test_dataloader()
    assert batch["input_ids"].tolist()[1] == numbers("<s> a </s> <pad> <pad>")
    assert batch["labels"].tolist() == [
        numbers("x y </s>"),
        [*numbers("x </s>"), IGNORED],
        numbers("y z </s>"),
    ]


class TwoVocabularies(PreTrainedTokenizer):
    """Letters, numbered from 10 on where they are read and from 50 on where they are written.

    It is none of the fast ones, which tell where in a text a token stands; Marian's is none either.
    """

    def __init__(self, **settings):
        self.first = 10
        super().__init__(pad_token="<pad>", eos_token="</s>", unk_token="<unk>", **settings)

    @property
    def vocab_size(self):
        return 100

    def get_vocab(self):
        return {"<pad>": 0, "</s>": 1, "<unk>": 2}

    def _tokenize(self, text):
        return list(text.replace(" ", ""))

    def _convert_token_to_id(self, token):
        return self.get_vocab().get(token, self.first + ord(token[0]) - ord("a"))

    def _convert_id_to_token(self, index):
        return chr(index - self.first + ord("a"))

    def build_inputs_with_special_tokens(self, tokens, others=None):
        return [*tokens, 1]

    def _switch_to_input_mode(self):
        self.first = 10

    def _switch_to_target_mode(self):
        self.first = 50


def test_targets_are_written_in_the_vocabulary_of_their_side():
    tool = TwoVocabularies(model_max_length=512)
    pairs = TextPairs(tool, encoder_decoder=True)
    assert pairs.write("ab", 5) == ([50, 51, 1], False)
    assert pairs.read("ab", 5) == ([10, 11, 1], False)
    # A causal model reads on in what it writes.
    assert TextPairs(tool, encoder_decoder=False).write("ab", 5) == ([10, 11, 1], False)


def test_long_texts_are_cut_by_a_tokenizer_that_tells_no_places():
    pairs = TextPairs(TwoVocabularies(model_max_length=512), True, "x {source} y")
    assert pairs.read("a b c d", 2) == ([33, 10, 11, 34, 1], True)
    assert pairs.read("a b", 2) == ([33, 10, 11, 34, 1], False)


def test_batches_to_answer_keep_the_references(tokenizer):
    rows = [{"input_ids": [2, 6], "target": [11, 1], "references": ["x", "y"]}]
    collate = pickle.loads(pickle.dumps(PairCollator(0, False, asks=True)))
    assert collate(rows)["row_references"] == [["x", "y"]]
    assert "labels" not in collate(rows)


def test_long_texts_are_cut_but_never_the_prompt_or_the_end(table, tokenizer):
    settings = {"prompt": "Put {source} :", "max_source": 2, "max_target": 2}
    data = GenerationData(path={"test": table}, **settings).connect(tokenizer)
    data.setup("test")
    (batch,) = data.test_dataloader()
    assert batch["input_ids"].tolist()[0] == numbers("<s> Put a b : x </s>")
    assert batch["input_ids"].tolist()[1] == numbers("<s> Put a : x </s> <pad>")


def test_braces_in_a_text_are_text(tokenizer):
    pairs = TextPairs(tokenizer, encoder_decoder=False, prompt="Put {source} :")
    assert pairs.read("{source} {} a", 64)[0] == numbers("<s> Put <unk> <unk> a :")


def test_parallel_files_by_split_and_side(tmp_path, tokenizer):
    files = lines(tmp_path, source="a\nb\nc d\n", target="x\ny\nz\n")
    data = GenerationData(path={"train": files, "test": files}, source="en", target="de")
    assert data.table("test").column_names == ["en", "de"]
    assert data.has_split("validation")
    alone = GenerationData(path=files)
    assert len(alone.table("train")) == 3
    assert not alone.has_split("test")


def test_a_file_of_texts_is_enough_to_predict(tmp_path, tokenizer):
    files = lines(tmp_path, en="a\nb\n", target="x\ny\n", source="c\n")
    new = GenerationData(path=files["en"]).connect(tokenizer)
    assert new.predict_rows() == [{"source": "a"}, {"source": "b"}]
    with pytest.raises(DataError, match=r"`target` must be a column of `.*new\.en` \(source\)"):
        new.setup("fit")
    # as `data.path={source: ...}` merges with what a run has saved
    saved = {"train": files["en"], "test": {"source": files["en"], "target": files["target"]}}
    merged = GenerationData(path={**saved, "source": files["source"]})
    assert merged.inputs("predict") == ["c"]
    assert merged.targets("test") == [["x"], ["y"]]


def test_parts_of_a_column_as_data_sets_of_the_hub_have_them(tmp_path):
    rows = [{"translation": {"en": text, "de": text.upper()}} for text in "abc"]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = GenerationData(
        path={"test": str(path)}, source="translation.en", target="translation.de"
    )
    assert data.inputs("test") == ["a", "b", "c"]
    assert data.targets("test") == [["A"], ["B"], ["C"]]


@pytest.mark.parametrize("row", [{"en": "a", "de": "b"}, "text"])
def test_parts_of_a_column_that_are_not_there_are_told(tmp_path, tokenizer, row):
    path = tmp_path / "t.jsonl"
    path.write_text((json.dumps({"translation": row}) + "\n") * 3)
    data = GenerationData(path=str(path), source="translation.en", target="translation.fr")
    with pytest.raises(DataError, match=r"must be a column of .*, but is 'translation\.(fr|en)'"):
        data.connect(tokenizer).setup("fit")


def test_parallel_files_in_parts(tmp_path, tokenizer):
    for part in "12":
        lines(tmp_path, en=f"a {part}\n", de=f"x {part}\n")
        for side in ("en", "de"):
            (tmp_path / f"new.{side}").rename(tmp_path / f"p{part}.{side}")
    sides = {"source": str(tmp_path / "p*.en"), "target": str(tmp_path / "p*.de")}
    data = GenerationData(path={"test": sides}).connect(tokenizer)
    assert data.inputs("test") == ["a 1", "a 2"]
    assert data.targets("test") == [["x 1"], ["x 2"]]


def test_several_references_stand_where_there_is_no_target(tmp_path, tokenizer):
    one, three = tmp_path / "one.jsonl", tmp_path / "three.jsonl"
    one.write_text('{"source": "a", "target": "x"}\n' * 3, encoding="utf-8")
    three.write_text('{"source": "b", "s1": "y", "s2": "z"}\n', encoding="utf-8")
    data = GenerationData(
        path={"train": str(one), "test": str(three)}, references=["s1", "s2"]
    ).connect(tokenizer)
    assert data.targets("test") == [["y", "z"]]
    data.setup("test")
    (batch,) = data.test_dataloader()
    assert batch["input_ids"].tolist() == [numbers("<s> b y </s>")]
    assert len(data.table("train")) == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            '{"source": " ", "target": "x"}',
            r"`source` must be a text in every row .* empty in row 2",
        ),
        (
            '{"source": "a", "target": ""}',
            r"`target` must be a text in every row .* empty in row 2",
        ),
        ('{"source": "a"}', r"`target` must be a text in every row .* empty in row 2"),
        ('{"source": "a", "target": 3}', r"`target` is a number in row 2"),
    ],
)
def test_bad_rows_are_refused_or_left_out(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    good = '{"source": "a", "target": "x"}'
    path.write_text("\n".join([good, row, good]), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        GenerationData(path={"test": str(path)}).table("test")
    data = GenerationData(path={"test": str(path)}, skip_bad_rows=True)
    assert len(data.table("test")) == 2
    assert data.skipped == {"test": 1}


def test_texts_that_are_held_out_are_not_trained_on(tmp_path, tokenizer):
    train = lines(tmp_path, source="a b\nb\nc d\nd\ne\n", target="x\ny\nz\nx\ny\n")
    held = tmp_path / "held.csv"
    held.write_text("source,target\nA  B,q\n", encoding="utf-8")
    data = GenerationData(path={"train": train, "test": str(held)}, validation=0.2)
    data.setup("fit")
    assert data.dropped == 1


def test_settings_that_cannot_be_met_are_refused(table, tokenizer):
    with pytest.raises(ConfigError, match=r"`prompt` must hold \{source\} once"):
        GenerationData(path=table, prompt="Translate").connect(tokenizer)
    with pytest.raises(ConfigError, match="`max_source` and `max_target` must be at least 2"):
        GenerationData(path=table, max_target=1)
    with pytest.raises(ConfigError, match=r"by side \(source, target\), but has 'en'"):
        GenerationData(path={"train": {"en": table, "target": table}})
    with pytest.raises(
        ConfigError, match="`max_source` and `max_target` together must be at most 512"
    ):
        GenerationData(path=table, max_source=500).connect(tokenizer)
    with pytest.raises(ConfigError, match="must be called before"):
        GenerationData(path=table).train_dataloader()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="must have an end token"):
        TextPairs(tokenizer, encoder_decoder=True)


def test_training_sees_like_lengths_together(tmp_path, tokenizer):
    rows = {"source": ["a " * (1 + i % 7) + "b" for i in range(64)], "target": ["x"] * 64}
    path = tmp_path / "rows.parquet"
    Dataset.from_dict(rows).to_parquet(str(path))
    data = GenerationData(path=str(path), batch_size=4, by_length=True, validation=0.1)
    data.connect(tokenizer)
    data.setup("fit")
    spread = [
        int(batch["attention_mask"].sum(1).max() - batch["attention_mask"].sum(1).min())
        for batch in data.train_dataloader()
    ]
    assert torch.tensor(spread).float().mean() < 1.5
