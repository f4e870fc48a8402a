"""A conversation in this process: what Ctrl-C and a long history do."""

import torch

from lightning_peft.data.chat_format import ChatFormat
from lightning_peft.jobs.conversation import Conversation
from lightning_peft.jobs.speaking import Sampling, Speaker, Telling
from tests.tiny_chat import tiny_llama, tiny_tokenizer


class Stopping(torch.nn.Module):
    """Raises what Ctrl-C does at a certain step of an answer."""

    def __init__(self, at):
        super().__init__()
        self.at, self.steps = at, 0

    def forward(self, *args):
        self.steps += 1
        if self.steps == self.at:
            raise KeyboardInterrupt


def conversation(tmp_path, at=None, **settings):
    model = tiny_llama()
    if at is not None:
        stop = Stopping(at)
        model.register_forward_pre_hook(lambda *args: stop())
    sampling = {"max_new_tokens": 6, "temperature": 0, "top_p": 1, "repetition_penalty": 1.2}
    speaker = Speaker(model, ChatFormat(tiny_tokenizer()), Sampling(**sampling | settings))
    return Conversation(speaker, ["default"], None, tmp_path / "chats.jsonl")


def typed(monkeypatch, *lines):
    found = iter(lines)

    def read(prompt):
        line = next(found, EOFError)
        if isinstance(line, type):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)


def test_ctrl_c_stops_an_answer_and_not_the_program(tmp_path, monkeypatch, capsys):
    typed(monkeypatch, KeyboardInterrupt, "hello", "how are you", "/exit", "never")
    talk = conversation(tmp_path, at=4)
    talk.run()
    out = capsys.readouterr().out
    assert "(/exit or Ctrl-D leaves)" in out
    assert out.count(" [stopped]") == 1
    said = [turn["content"] for turn in talk.turns if turn["role"] == "assistant"]
    assert len(said) == 2
    assert len(talk.speaker.chat.tokenizer(said[0])["input_ids"]) < 6
    assert "never" not in out


def test_an_answer_is_told_as_it_comes_and_in_whole_characters():
    chats, told = ChatFormat(tiny_tokenizer()), []
    telling = Telling(chats, told.append)
    ids = chats.tokenizer("naïve 😀 ok")["input_ids"]
    telling.put(torch.tensor([[5, 6, 7]]))  # the prompt
    for one in ids:
        telling.put(torch.tensor([one]))
    telling.end()
    assert "".join(told) == telling.text == "naïve 😀 ok"
    assert len([piece for piece in told if piece]) > 5


def test_sampling_and_a_long_history(tmp_path, monkeypatch, capsys):
    typed(monkeypatch, *["hello how are you " * 12] * 8)
    talk = conversation(tmp_path, temperature=0.8, top_p=0.9)
    talk.run()
    assert len([turn for turn in talk.turns if turn["role"] == "user"]) > 5
    assert "Error" not in capsys.readouterr().out
