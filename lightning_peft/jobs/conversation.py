"""A conversation in the terminal: what is typed, what is answered, and commands with a slash."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning_peft.carrying.switching import switch
from lightning_peft.data.conversations import Turn
from lightning_peft.errors import PEFTError, near_misses
from lightning_peft.jobs.speaking import Speaker

_HELP = """\
/adapter <name>  answer with another adapter; without a name: which there are
/base            answer with the base alone, without an adapter
/reset           forget the conversation
/save [file]     add the conversation to a file that `data=chat` reads
/exit            leave; so does Ctrl-D
Ctrl-C stops an answer. Anything else is said to the model."""


@dataclass
class Conversation:
    """Questions from standard input and answers on standard output, until `/exit` or the end."""

    speaker: Speaker
    adapters: Sequence[str]
    """Those that the model carries; the first one answers."""
    system: str | None
    """What the system says at the beginning."""
    file: Path
    """Where `/save` writes unless it is told."""
    turns: list[Turn] = field(default_factory=list)
    """What was said so far."""
    ended: bool = False

    def __post_init__(self) -> None:
        self.active = self.adapters[0]
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: _say(_HELP),
            "/adapter": self.switch_to,
            "/base": lambda _: self.use_base(),
            "/reset": lambda _: self.reset(),
            "/save": self.save,
            "/exit": lambda _: self.leave(),
        }

    def run(self) -> None:
        """Talk until the end."""
        _say(f"Talking with {self.active}; /help tells the commands.")
        self._begin()
        while not self.ended:
            try:
                self.take(_read(f"{self.active}> "))
            except KeyboardInterrupt:
                _say("\n(/exit or Ctrl-D leaves)")
            except EOFError:
                self.ended = True
            except PEFTError as error:
                _say(f"Error: {error}")

    def take(self, line: str) -> None:
        """Do what one line says: a command, or something to answer."""
        line = line.strip()
        if line.startswith("/"):
            name, _, argument = line.partition(" ")
            command = self._commands.get(name, lambda _: _refuse(name, self._commands))
            command(argument.strip())
        elif line:
            self.answer(line)

    def answer(self, text: str) -> None:
        """Say something to the model, and tell its answer; both are kept."""
        asking: list[Turn] = [*self.turns, {"role": "user", "content": text}]
        answer = self.speaker.answer(asking, _tell)
        _say("")
        if answer:  # an empty one is nothing that could be read again
            self.turns = [*asking, {"role": "assistant", "content": answer}]

    def switch_to(self, name: str) -> None:
        """Let another adapter answer from now on."""
        if name not in self.adapters:
            wrong = f"There is no adapter {name!r}.{near_misses(name, self.adapters)} "
            _say(f"{wrong if name else ''}The adapters are {', '.join(self.adapters)}.")
            return
        switch(self.speaker.model, name)
        self.active = name

    def use_base(self) -> None:
        """Let the base answer alone."""
        switch(self.speaker.model, ())
        self.active = "base"

    def reset(self) -> None:
        """Forget what was said."""
        self._begin()
        _say("The conversation begins anew.")

    def save(self, file: str) -> None:
        """Add the conversation to a file, a line of JSON."""
        if not any(turn["role"] == "assistant" for turn in self.turns):
            _say("There is nothing to save yet.")
            return
        path = Path(file).expanduser() if file else self.file
        try:
            with path.open("a", encoding="utf-8") as opened:
                opened.write(json.dumps({"messages": self.turns}, ensure_ascii=False) + "\n")
        except OSError as error:
            _say(f"Error: `{path}` cannot be written: {error.strerror}.")
            return
        _say(f"Added to {path}")

    def leave(self) -> None:
        """End the conversation."""
        self.ended = True

    def _begin(self) -> None:
        self.turns = [{"role": "system", "content": self.system}] if self.system else []


def _refuse(name: str, known: dict[str, Callable[[str], None]]) -> None:
    _say(f"There is no command {name!r}.{near_misses(name, known)} /help tells them.")


def _read(prompt: str) -> str:
    line = input(prompt)
    if not sys.stdin.isatty():
        _say(line)  # what a terminal shows while it is typed
    return line


def _tell(text: str) -> None:
    print(text, end="", flush=True)  # noqa: T201


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201
