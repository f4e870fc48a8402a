import math

import pytest
import torch

from lightning_peft import LoRA, PromptTuning, inject
from lightning_peft.config import instantiate, to_spec
from lightning_peft.data.chat import ChatData
from lightning_peft.data.chat_format import IGNORED
from lightning_peft.errors import ConfigError, DataError
from lightning_peft.methods import LoReFT, PrefixTuning
from lightning_peft.models import ModelSource
from lightning_peft.tasks.chat import Chat
from lightning_peft.tasks.packing import check_packing
from lightning_peft.tasks.replies import Reply, TokenScore, distinct, relevance
from tests.tiny_chat import chat, save_tiny, tiny_llama, write_rows


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> ModelSource:
    return ModelSource(name=str(save_tiny(tmp_path_factory.mktemp("tiny"))))


def equipped(source, path, rows, **settings):
    data = ChatData(path={"test": write_rows(path / "t.jsonl", rows)}, **settings)
    task = Chat(max_new_tokens=8, samples=2)
    task.equip(data, source)
    return task, data


ROWS = [
    {"messages": chat("hello", "fine thanks", "how are you", "and you", system="user")},
    {"messages": chat("the weather", "is nice")},
    {"messages": chat("hello", "hello " * 12)},
]


def test_the_loss_is_that_of_the_assistants_tokens_alone(source, tmp_path):
    task, data = equipped(source, tmp_path, ROWS)
    model = task.load_model(source)
    batch = next(iter(data.test_dataloader()))
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none"
    )
    counts = batch["labels"][:, 1:] != IGNORED
    expected = losses[counts].mean()
    torch.testing.assert_close(task.step(model, batch).loss, expected)
    out = task.evaluate(model, batch)
    torch.testing.assert_close(out.loss, expected)
    assert [reply.tokens for reply in out.predictions] == counts.sum(1).tolist()
    for reply, loss, count in zip(out.predictions, losses, counts, strict=True):
        assert reply.nll == pytest.approx(loss[count].sum().item(), rel=1e-5)
    assert out.weight == counts.sum()


def test_perplexity_weighs_tokens_and_not_batches(source, tmp_path):
    task, data = equipped(source, tmp_path, ROWS, batch_size=1)
    model = task.load_model(source)
    outs = [task.evaluate(model, batch) for batch in data.test_dataloader()]
    metrics = task.metrics()
    for out in outs:
        metrics.update(out.predictions, out.targets)
    found = metrics.compute()
    said = [reply for out in outs for reply in out.predictions]
    mean = sum(one.nll for one in said) / sum(one.tokens for one in said)
    assert found["perplexity"].item() == pytest.approx(math.exp(mean), rel=1e-5)
    assert found["perplexity"].item() != pytest.approx(
        math.exp(sum(out.loss.item() for out in outs) / len(outs)), rel=1e-4
    )


def test_answers_are_those_of_each_row_alone(source, tmp_path):
    task, data = equipped(source, tmp_path, ROWS)
    model = task.load_model(source)
    asked, numbers = task.asked(data.test_dataloader())
    assert list(numbers) == [0, 1]
    (batch,) = asked
    assert batch["row_references"] == ["and you", "is nice"]
    found = task.predictions(model, batch)
    for row in (0, 1):
        ids = torch.tensor([data.format.prompt(data.inputs("test")[row], 512)])
        alone = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=data.format.stops,
            pad_token_id=0,
        )
        assert found[row] == {"answer": data.format.text(alone[0, ids.shape[1] :].tolist())}
    assert task.example(data.inputs("test")[0], "x", found[0]).text == "how are you"


def test_the_model_learns_to_answer(source, tmp_path):
    task, data = equipped(source, tmp_path, ROWS[:2])
    model = task.load_model(source)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    batch = next(iter(data.test_dataloader()))
    for _ in range(60):
        optimizer.zero_grad()
        task.step(model, batch).loss.backward()
        optimizer.step()
    (asked,) = task.asked(data.test_dataloader())[0]
    answers = task.predictions(model, asked)
    assert answers == [{"answer": "and you"}, {"answer": "is nice"}]
    assert task.scores(data.targets("test"), answers)["relevance"] == 1
    out = task.evaluate(model, batch)
    metrics = task.metrics()
    metrics.update(out.predictions, out.targets)
    found = metrics.compute()
    assert found["accuracy"] == 1
    assert found["perplexity"] < 1.2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", [None, LoRA(), PrefixTuning(tokens=3)], ids=str)
def test_packed_conversations_are_read_as_if_apart(source, tmp_path, attention, method):
    rows = [{"messages": chat(f"hello {i}", "fine " * (i % 3 + 1), "and", "you")} for i in range(6)]
    settings = {"max_length": 128, "batch_size": 2}
    path = {
        "train": write_rows(tmp_path / "t.jsonl", rows),
        "validation": str(tmp_path / "v.jsonl"),
    }
    write_rows(tmp_path / "v.jsonl", [{"messages": chat("a", "b")}])
    task = Chat()
    model = tiny_llama(attn_implementation=attention)
    if method is not None:
        adapter = inject(model, method)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.normal_(0, 0.3)
    losses = {}
    for pack in (False, True):
        data = ChatData(path=path, pack=pack, **settings)
        task.equip(data, source)
        torch.manual_seed(0)
        batches = list(data.train_dataloader())
        losses[pack] = sorted(
            round(loss.item(), 4) for batch in batches for loss in _token_losses(task, model, batch)
        )
    check_packing(model, 320)
    assert len(losses[True]) == len(losses[False])
    torch.testing.assert_close(*map(torch.tensor, losses.values()), atol=2e-4, rtol=0)


def _token_losses(task, model, batch):
    from lightning_peft.tasks.chat import _said

    with torch.no_grad():
        logits, targets, _ = _said(model, batch)
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


@pytest.mark.parametrize(
    "method", [PromptTuning(tokens=4), LoReFT(prefix=2, suffix=2)], ids=["prompt", "loreft"]
)
def test_methods_that_act_at_a_place_in_the_row_cannot_be_packed(source, tmp_path, method):
    data = ChatData(path={"train": write_rows(tmp_path / "t.jsonl", ROWS)}, pack=True)
    task = Chat()
    task.equip(data, source)
    model = task.load_model(source)
    task.check(model, data)
    adapter = inject(model, method)
    before = {name: value.clone() for name, value in adapter.state_dict().items()}
    with pytest.raises(ConfigError, match=r"`data.pack` must be false for .*Llama"):
        task.check(model, data)
    for name, value in adapter.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("kind", ["Bloom", "Mamba"])
def test_a_model_that_ignores_positions_cannot_be_packed(kind):
    import transformers

    config = getattr(transformers, f"{kind}Config")(vocab_size=64, hidden_size=16, n_layer=1)
    config.n_head, config.num_hidden_layers = 2, 1
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with pytest.raises(ConfigError, match=rf"`data.pack` must be false for {kind}"):
        check_packing(model.eval(), 64)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(source, tmp_path):
    task, data = equipped(source, tmp_path, ROWS)
    with pytest.raises(ConfigError, match="at most the 200 tokens that the model knows"):
        task.check(tiny_llama(200), data)


def test_settings_are_checked_and_stored(source, tmp_path):
    for wrong in ({"max_new_tokens": 0}, {"samples": -1}):
        with pytest.raises(ConfigError, match="at least 1 and `samples` 0 or more"):
            Chat(**wrong)
    assert to_spec(instantiate(to_spec(Chat(samples=3)))) == to_spec(Chat(samples=3))
    with pytest.raises(DataError, match="must have `labels`"):
        Chat().step(tiny_llama(), {"input_ids": torch.zeros(1, 2, dtype=torch.long)})


def test_relevance_and_diversity_of_answers():
    answers = ["The tea, is hot", "tea is hot"]
    assert relevance(answers, ["tea is cold", "no"]) == pytest.approx(2 / 3 / 2)
    assert distinct(answers) == pytest.approx(2 / 4)
    assert distinct([""]) == 0
    assert Chat(samples=0).scores([], []) == {}


def test_tokens_count_the_same_in_long_and_short_rows():
    accuracy = TokenScore("accuracy")
    accuracy.update([Reply(1, 1, 1), Reply(1, 3, 0)], torch.zeros(2, 3))
    assert accuracy.compute() == pytest.approx(1 / 4)
