"""`job=chat run=<folder>`: talk to a tuned model in the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig

from lightning_peft.carrying.switching import switch
from lightning_peft.data.chat import ChatData
from lightning_peft.errors import ConfigError
from lightning_peft.files.adapter_folder import load_adapter
from lightning_peft.jobs import judging
from lightning_peft.jobs.beside import by_name
from lightning_peft.jobs.conversation import Conversation
from lightning_peft.jobs.job import Job
from lightning_peft.jobs.run_folder import existing, resolved
from lightning_peft.jobs.speaking import Sampling, Speaker
from lightning_peft.jobs.trainers import for_judging
from lightning_peft.module import PEFTModule


@dataclass(frozen=True, kw_only=True)
class Chat(Job):
    """Answer what is typed, or piped in, with a run's adapter, another one, or the base alone."""

    checkpoint: str = "best"
    """Which one: best, last, or a file."""

    adapters: Sequence[str] = ()
    """Folders of further adapters of the same base, to switch to by their names."""

    system: str | None = None
    """What the system says at the beginning; None takes what the run's data has."""

    max_new_tokens: int = 256
    """Tokens of an answer at most."""

    temperature: float = 0.7
    """How freely words are chosen; 0 takes the likeliest one."""

    top_p: float = 0.9
    """Words are chosen among the likeliest that have this probability together."""

    repetition_penalty: float = 1.1
    """Above 1, words that were said already become less likely."""

    def run(self, config: DictConfig) -> None:
        sampling = Sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
        )
        settings, run = resolved(config), existing(config, "chat")
        module, data = judging.load(settings, judging.checkpoint_of(run, self.checkpoint))
        if not isinstance(data, ChatData):
            raise ConfigError(
                f"`run` must be the folder of a run with task=chat, but {str(run.path)!r} was "
                f"trained on {type(data).__name__}: use `job=predict`."
            )
        others = by_name(self.adapters, module.adapter.name)
        _load_beside(module, others)
        torch.manual_seed(settings["seed"])
        module.to(for_judging(settings, []).strategy.root_device).eval()
        Conversation(
            speaker=Speaker(module.model, data.format, sampling),
            adapters=(module.adapter.name, *others),
            system=self.system or data.system,
            file=run.path / "chats.jsonl",
        ).run()


def _load_beside(module: PEFTModule, folders: dict[str, Path]) -> None:
    switch(module.model, ())  # what the run trained in place is no part of the others' base
    for name, folder in folders.items():
        load_adapter(module.model, folder, name).deactivate()
    switch(module.model, module.adapter.name)
