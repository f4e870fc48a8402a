"""Prompt tuning: trained vectors stand before the text (Lester et al. 2021).

The Power of Scale for Parameter-Efficient Prompt Tuning, https://arxiv.org/abs/2104.08691:

    y = f([P; E(x)]),    P ∈ R^(tokens × d_model)

The base f and its word embedding E are frozen, P is all that is trained. It starts from vectors of
real words, which the paper finds to matter most for models below ten billion parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from lightning_peft.delta import Delta
from lightning_peft.deltas.virtual_tokens import Layout, Virtual
from lightning_peft.errors import ConfigError
from lightning_peft.method import Method
from lightning_peft.structure.cores import virtual_deltas
from lightning_peft.structure.words import Start, check_tokens, ids_of_text, starting_vectors


@dataclass(frozen=True, kw_only=True)
class PromptTuning(Method):
    """Trained vectors before the text, or among the patches of an image.

    Raises:
        ConfigError: a setting is out of its range, or says nothing beside the others.
    """

    kind: ClassVar[str] = "prompt"
    starts_as_base: ClassVar[bool] = False

    tokens: int = 20
    """How many vectors are trained; each takes the place of a token of text."""

    init: Literal["vocabulary", "random", "text"] = "vocabulary"
    """Start from words drawn from the vocabulary, from noise of their size, or from a text."""

    init_text: str = ""
    """The text to start from, cut or repeated to `tokens`; its ids are kept in `init_ids`."""

    tokenizer: str = ""
    """Name or folder of the tokenizer for `init_text`, in most cases that of the model."""

    init_ids: Sequence[int] = ()
    """The ids of the words to start from, cut or repeated to `tokens`."""

    layout: Layout = "peft"
    """Where heads of encoders read: at the prompt's first vector, or "clean", as without it."""

    def __post_init__(self) -> None:
        check_tokens(self.tokens, self.layout)
        if self.init not in ("vocabulary", "random", "text"):
            raise ConfigError(
                f"`init` must be vocabulary, random or text, but is {self.init!r} instead."
            )
        if self.init_text and not self.init_ids:
            ids = ids_of_text("init_text", self.init_text, self.tokenizer)
            object.__setattr__(self, "init_ids", ids)
        if (self.init == "text") != bool(self.init_ids):
            raise ConfigError(
                f"`init` must be 'text' exactly when `init_text` or `init_ids` give one, but is "
                f"{self.init!r} with {len(self.init_ids)} ids."
            )

    def deltas(self, model: nn.Module) -> dict[str, Delta]:
        """Return the prompt, and what lets it enter and leave."""
        return virtual_deltas(model, self._prompt, self.layout)

    def _prompt(self, host: nn.Module) -> "Prompt":
        init = None if self.init == "random" else tuple(self.init_ids)
        return Prompt(starting_vectors(host, self.tokens, init))


class Prompt(Virtual):
    """The trained vectors, `(tokens, d_model)`."""

    def __init__(self, start: Start) -> None:
        super().__init__(len(start.vectors), start.among)
        self.size = start.size
        self.prompt = nn.Parameter(start.vectors)

    def reset_parameters(self) -> None:
        """Noise of the size of the words' vectors: which words to start from is not kept."""
        nn.init.normal_(self.prompt, std=self.size)

    def vectors(self) -> Tensor:
        """Return the vectors themselves."""
        return self.prompt
