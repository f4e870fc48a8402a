"""P-tuning: a small network writes the vectors that stand before the text (Liu et al. 2021).

GPT Understands, Too, https://arxiv.org/abs/2103.10385:

    y = f([P; E(x)]),    P = encoder(H),    H ∈ R^(tokens × d_model)

The encoder is an MLP, or the paper's bidirectional LSTM with an MLP behind it; it couples vectors
that would else be trained one by one, and is kept with the adapter. Anchors are real words that
stand in the middle of the vectors and are not trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_peft.delta import Delta
from lightning_peft.deltas.virtual_tokens import Layout, Virtual
from lightning_peft.errors import ConfigError
from lightning_peft.method import Method
from lightning_peft.structure.cores import virtual_deltas
from lightning_peft.structure.words import Start, check_tokens, ids_of_text, starting_vectors


@dataclass(frozen=True, kw_only=True)
class PTuning(Method):
    """Vectors before the text that a trained encoder writes.

    Raises:
        ConfigError: a setting is out of its range, or the anchors' text has no tokenizer.
    """

    kind: ClassVar[str] = "p_tuning"
    starts_as_base: ClassVar[bool] = False

    tokens: int = 20
    """How many vectors the encoder writes; each takes the place of a token of text."""

    encoder: Literal["mlp", "lstm"] = "mlp"
    """The encoder: "mlp" (three layers), or "lstm" (bidirectional, two layers behind it)."""

    hidden_size: int | None = None
    """Width of the encoder; None takes the model's, which an LSTM shares between directions."""

    layers: int = 2
    """How many layers the LSTM has; the MLP always has three."""

    dropout: float = 0.0
    """Probability with which an entry between the LSTM's layers is zeroed during training."""

    anchor_text: str = ""
    """Words that stand in the middle of the vectors; their ids are kept in `anchor_ids`."""

    tokenizer: str = ""
    """Name or folder of the tokenizer for `anchor_text`, in most cases that of the model."""

    anchor_ids: Sequence[int] = ()
    """The ids of the words that stand in the middle of the vectors."""

    layout: Layout = "peft"
    """Where heads of encoders read: at the prompt's first vector, or "clean", as without it."""

    def __post_init__(self) -> None:
        check_tokens(self.tokens, self.layout)
        if self.encoder not in ("mlp", "lstm"):
            raise ConfigError(f"`encoder` must be mlp or lstm, but is {self.encoder!r} instead.")
        for name in ("hidden_size", "layers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"`{name}` must be at least 1, but is {value} instead.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"`dropout` must lie in [0, 1), but is {self.dropout} instead.")
        if self.anchor_text and not self.anchor_ids:
            ids = ids_of_text("anchor_text", self.anchor_text, self.tokenizer)
            object.__setattr__(self, "anchor_ids", ids)

    def deltas(self, model: nn.Module) -> dict[str, Delta]:
        """Return the encoder, and what lets its vectors enter and leave."""
        return virtual_deltas(model, self._encoder, self.layout, self._arranged)

    def _encoder(self, host: nn.Module) -> "Encoded":
        start = starting_vectors(host, self.tokens, None)
        width = start.vectors.shape[1]
        encoder: nn.Module
        if self.encoder == "mlp":
            encoder = mlp(width, self.hidden_size or width, start.vectors)
        else:
            hidden = self.hidden_size or max(width // 2, 1)
            encoder = Recurrent(width, hidden, self.layers, self.dropout, start.vectors)
        return Encoded(start, encoder)

    def _arranged(self, ids: Sequence[int]) -> list[int]:
        half = len(ids) // 2
        return [*ids[:half], *self.anchor_ids, *ids[half:]]


class Encoded(Virtual):
    """The vectors as the encoder writes them.

    Shapes: `inputs` `(tokens, d_model)`, vectors `(tokens, d_model)`.
    """

    def __init__(self, start: Start, encoder: nn.Module) -> None:
        super().__init__(len(start.vectors), start.among)
        self.size, self.encoder = start.size, encoder
        self.inputs = nn.Parameter(torch.empty_like(start.vectors))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Standard normal inputs; the last layer is scaled until vectors are as large as words."""
        nn.init.normal_(self.inputs)
        if self.inputs.is_meta:
            return
        with torch.no_grad():
            factor = self.size / self.vectors().square().mean().sqrt()
            for parameter in last_layer(self.encoder).parameters():
                parameter.mul_(factor)

    def vectors(self) -> Tensor:
        """Return what the encoder writes; a frozen copy of it is all that an export needs."""
        written: Tensor = self.encoder(self.inputs)
        return written


class Recurrent(nn.Module):
    """The paper's encoder: a bidirectional LSTM, then an MLP of two layers."""

    def __init__(self, width: int, hidden: int, layers: int, dropout: float, like: Tensor) -> None:
        super().__init__()
        made: Any = {"dtype": like.dtype, "device": like.device}
        self.lstm = nn.LSTM(
            width, hidden, layers, dropout=dropout, bidirectional=True, batch_first=True, **made
        )
        self.head = nn.Sequential(
            nn.Linear(2 * hidden, 2 * hidden, **made),
            nn.ReLU(),
            nn.Linear(2 * hidden, width, **made),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Return one vector for each of the inputs, `(tokens, d_model)`."""
        written: Tensor = self.head(self.lstm(inputs)[0])
        return written


def mlp(width: int, hidden: int, like: Tensor) -> nn.Sequential:
    """Return the encoder with three layers, in the dtype and on the device of `like`."""
    made: Any = {"dtype": like.dtype, "device": like.device}
    return nn.Sequential(
        nn.Linear(width, hidden, **made),
        nn.ReLU(),
        nn.Linear(hidden, hidden, **made),
        nn.ReLU(),
        nn.Linear(hidden, width, **made),
    )


def last_layer(encoder: nn.Module) -> nn.Linear:
    """Return the encoder's last layer."""
    return [module for module in encoder.modules() if isinstance(module, nn.Linear)][-1]
