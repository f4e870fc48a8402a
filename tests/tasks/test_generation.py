import pytest
import sacrebleu
import torch
from datasets import Dataset
from rouge_score.rouge_scorer import RougeScorer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from lightning_peft import BottleneckAdapter, LoRA, PrefixTuning, PromptTuning, PTuning, inject
from lightning_peft.config import instantiate
from lightning_peft.data.text_pairs import IGNORED, PairCollator, TextPairs
from lightning_peft.errors import ConfigError, DataError
from lightning_peft.methods import IA3, PTuningV2
from lightning_peft.models import ModelSource
from lightning_peft.tasks.house_style import agreement, habits
from lightning_peft.tasks.summarisation import Summarisation
from lightning_peft.tasks.translation import Translation

VOCABULARY = 40
METHODS = [
    LoRA(),
    BottleneckAdapter(),
    IA3(),
    PrefixTuning(),
    PTuningV2(),
    PromptTuning(),
    PTuning(),
]
TEXT = "Tom asks #Person2# to wait. #Person2# agrees."


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=48, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )
    )  # fmt: skip


def t5():
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        pad_token_id=0, eos_token_id=1, dropout_rate=0.0,
    )  # fmt: skip
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config)


def two_berts():
    part = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=48, pad_token_id=0,
    )  # fmt: skip
    config = EncoderDecoderConfig.from_encoder_decoder_configs(part, part)
    config.pad_token_id, config.decoder_start_token_id = 0, 2
    return EncoderDecoderModel(config=config)


BUILDERS = {"llama": llama, "t5": t5, "two_berts": two_berts}


@pytest.fixture
def tokenizer():
    words = {f"w{i}": i for i in range(2, VOCABULARY)} | {"<pad>": 0, "</s>": 1}
    tool = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tool.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tool, pad_token="<pad>", eos_token="</s>", model_max_length=512
    )


@pytest.fixture(params=BUILDERS)
def model(request):
    torch.manual_seed(0)
    found = BUILDERS[request.param]()
    with torch.no_grad():  # else the likeliest token is the same one everywhere
        for parameter in found.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        found.get_output_embeddings().weight[:2] = 0  # nor is it padding or the end
    return found.eval()


class Data:
    """What the task asks of a data module."""

    def __init__(self, tokenizer, model):
        self.pairs = TextPairs(tokenizer, bool(model.config.is_encoder_decoder))


def rows(count=5):
    draw = torch.Generator().manual_seed(1)
    found = []
    for i in range(count):
        read = torch.randint(2, VOCABULARY, (2 + 3 * (i % 3),), generator=draw).tolist()
        target = torch.randint(2, VOCABULARY, (1 + i % 4,), generator=draw).tolist()
        right = " ".join(f"w{token}" for token in target)
        found.append({"input_ids": read, "target": [*target, 1], "references": [right]})
    return found


def collator(model, asks=False):
    return PairCollator(0, bool(model.config.is_encoder_decoder), asks)


@pytest.fixture
def task(tokenizer, model):
    return Translation(max_new_tokens=6).connect(Data(tokenizer, model))


@pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces a better way:FutureWarning")
def test_the_loss_is_the_models_own(task, model):
    batch = collator(model)(rows())
    out = task.step(model, batch)
    torch.testing.assert_close(out.loss, model(**batch).loss)
    counts = out.targets != -100
    assert len(out.targets) == len(out.predictions) == len(rows())
    assert out.targets[counts].tolist() == [token for row in rows() for token in row["target"]]
    assert out.weight == counts.sum()
    accuracy = task.metrics()
    accuracy.update(out.predictions, out.targets)
    share = (out.predictions == out.targets)[counts].float().mean()
    assert accuracy.compute()["accuracy"] == pytest.approx(share.item())


@pytest.mark.parametrize("method", [None, *METHODS], ids=lambda m: type(m).__name__)
def test_rows_are_answered_in_a_batch_as_alone(task, model, method):
    if method is not None:
        adapter = inject(model, method)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    ask = collator(model, asks=True)
    alone = [task.predictions(model, ask([row]))[0] for row in rows()]
    assert task.predictions(model, ask(rows())) == alone
    assert len({one["text"] for one in alone}) > 1


def test_greedy_decoding_takes_the_likeliest_token(task, model):
    (row,) = rows(1)
    (found,) = task.predictions(model, collator(model, asks=True)([row]))
    if model.config.is_encoder_decoder:
        written = [model.config.decoder_start_token_id]
        given = {"input_ids": torch.tensor([row["input_ids"]])}
        following = lambda: model(**given, decoder_input_ids=torch.tensor([written]))  # noqa: E731
    else:
        written = list(row["input_ids"])
        following = lambda: model(input_ids=torch.tensor([written]))  # noqa: E731
    begin = len(written)
    with torch.no_grad():
        while (len(written) < begin + 6 and written[-1] != 1) or len(written) == begin:
            written.append(int(following().logits[0, -1].argmax()))
    assert found["text"].split() == [f"w{token}" for token in written[begin:] if token > 1]


def test_beams_find_texts_that_are_at_least_as_likely(tokenizer, model):
    def likelihood(task):
        found = task.predictions(model, collator(model, asks=True)(rows()))
        written = [
            {**row, "target": tokenizer(one["text"])["input_ids"] + [1]}
            for row, one in zip(rows(), found, strict=True)
        ]
        return [task.step(model, collator(model)([row])).loss.item() for row in written]

    data = Data(tokenizer, model)
    greedy, wide = (Translation(max_new_tokens=6, beams=beams).connect(data) for beams in (1, 8))
    assert sum(likelihood(wide)) < sum(likelihood(greedy))


def test_a_fixed_sample_of_rows_is_asked(task, model):
    table = Dataset.from_list(rows(9))
    loader = DataLoader(table, 4, collate_fn=collator(model))
    task.samples = 5
    asked, numbers = task.asked(loader)
    assert len(numbers) == 5
    assert task.asked(loader)[1] == numbers
    references = [one for batch in asked for one in batch["row_references"]]
    assert references == [table[i]["references"] for i in numbers]
    task.samples = None
    assert task.asked(loader)[1] == list(range(9))


def test_the_untouched_base_is_a_baseline(task, model):
    loader = DataLoader(Dataset.from_list(rows()), 4, collate_fn=collator(model))
    (found,) = task.baselines(model, loader, loader, None)
    assert set(found.validation) == {"accuracy", "bleu", "chrf"}
    assert found.test == {}
    assert found.trained == 0


def test_models_and_batches_that_do_not_fit_are_refused(task, model, tokenizer):
    other = (t5 if not model.config.is_encoder_decoder else llama)()
    with pytest.raises(ConfigError, match=r"call `data\.connect\(tokenizer, encoder_decoder="):
        task.check(other, Data(tokenizer, model))
    with pytest.raises(ConfigError, match="must be a transformers model that generates"):
        task.check(torch.nn.Linear(1, 1), Data(tokenizer, model))
    with pytest.raises(DataError, match="a batch must have `labels`"):
        task.step(model, collator(model, asks=True)(rows()))
    with pytest.raises(ConfigError, match="must be called before texts are generated"):
        Translation().predictions(model, collator(model, asks=True)(rows()))
    with pytest.raises(ConfigError, match="`beams` must be at least 1, but is 0"):
        Translation(beams=0)


def test_the_base_is_loaded_by_its_kind_and_without_its_own_decoding(
    task, model, tokenizer, tmp_path
):
    model.generation_config.update(do_sample=True, temperature=5.0, max_new_tokens=1)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = task.load_model(ModelSource(name=str(tmp_path)))
    assert type(loaded) is type(model)
    ask = collator(model, asks=True)
    model.generation_config = loaded.generation_config
    assert task.predictions(loaded, ask(rows())) == task.predictions(model, ask(rows()))


def test_settings_survive_storage():
    spec = Translation(max_new_tokens=9, beams=3, samples=None).to_spec()
    again = instantiate(spec)
    assert (again.max_new_tokens, again.beams, again.samples) == (9, 3, None)
    assert type(instantiate(Summarisation().to_spec())) is Summarisation


def test_translations_are_scored_by_sacrebleu():
    written = ["ein Mann geht", "zwei Hunde spielen im Schnee", "sie lacht"]
    right = [["ein Mann läuft", "ein Mann geht"], ["zwei Hunde spielen"], ["sie lacht laut"]]
    scores = Translation().scores(right, [{"text": text} for text in written])
    streams = [[r[0] for r in right], [r[1] if len(r) > 1 else None for r in right]]
    assert scores["bleu"] == sacrebleu.corpus_bleu(written, streams).score
    assert scores["chrf"] == sacrebleu.corpus_chrf(written, streams).score
    assert Translation().metric == "bleu"


def test_summaries_are_scored_by_rouge():
    written = ["Tom waits for the trains.", "nothing alike"]
    right = [["Tom is waiting for a train", "Ann sleeps"], ["other words entirely"]]
    scores = Summarisation().scores(right, [{"text": text} for text in written])
    official = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for kind in ("rouge1", "rouge2", "rougeL"):
        best = [
            official.score_multi(references, text)[kind].fmeasure
            for references, text in zip(right, written, strict=True)
        ]
        assert scores[kind] == pytest.approx(sum(best) / 2)
    other = Summarisation().scores([["Übergrößen ändern"]], [{"text": "Übergrößen ändern"}])
    assert other["rouge2"] == 1  # rouge_score alone would drop the letters beyond a to z


def test_the_style_of_a_house_is_counted():
    assert habits([TEXT]) == {
        "words": 7, "sentences": 2, "one_paragraph": 1, "begins_with_name": 1,
        "third_person": 1, "present_tense": 1, "full_stop": 1,
    }  # fmt: skip
    other = habits(["I asked you to wait\nand you did"])
    assert [other[name] for name in list(other)[1:]] == [0] * 6
    assert habits(["The man waits."])["begins_with_name"] == 0
    assert habits(["Tom waits.", "I wait."])["third_person"] == 0.5


def test_a_style_is_as_near_as_its_habits():
    house = habits([TEXT])
    assert agreement(house, house) == 1
    assert agreement(habits(["Tom waits."]), house) == pytest.approx((5 + 2 / 7) / 6)
    assert agreement(habits([""]), house) == 0
    task = Summarisation()
    table = task.by_class([[TEXT], [TEXT]], [{"text": TEXT}, {"text": TEXT}])
    assert table["references"] == table["generated"] == house
    assert task.scores([[TEXT]], [{"text": TEXT}])["style"] == 1


def test_the_prompt_of_a_causal_model_is_not_learned(tokenizer):
    batch = PairCollator(0, False)(rows(1))
    assert (batch["labels"][0, : len(rows(1)[0]["input_ids"])] == IGNORED).all()
