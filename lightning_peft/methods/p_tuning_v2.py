"""P-tuning v2: deep prompts in every layer (Liu et al. 2021, https://arxiv.org/abs/2110.07602).

In every attention module learned keys and values P_k, P_v ∈ R^(heads × n × d_head), trained as they
are, stand before those of the tokens:

    y = softmax(q [P_k; k]ᵀ / √d_head) [P_v; v]

It is prefix-tuning without reparameterisation, for encoders and understanding tasks too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lightning_peft.delta import Delta
from lightning_peft.deltas.learned_keys import LearnedKeys, check, chosen
from lightning_peft.method import Method
from lightning_peft.structure.targets import Patterns, Targets


@dataclass(frozen=True, kw_only=True)
class PTuningV2(Method):
    """Learned keys and values in the attention of every layer.

    Raises:
        ConfigError: a setting is out of its range.
    """

    kind: ClassVar[str] = "p_tuning_v2"
    starts_as_base: ClassVar[bool] = False

    tokens: int = 20
    """How many keys and values each attention module gets; hard tasks want up to 100."""

    dropout: float = 0.0
    """Probability with which an entry of them is zeroed during training."""

    targets: Targets | Patterns | None = None
    """Which attention modules: None (all that the model runs) or patterns."""

    layers: Sequence[int] | None = None
    """Indices of the layers to change (negative ones count from the top); None changes all."""

    def __post_init__(self) -> None:
        check(self.tokens, self.dropout, ())

    def deltas(self, model: nn.Module) -> dict[str, Delta]:
        """Return learned keys and values for each attention module."""
        seen = chosen(model, self.targets, self.layers)
        return {name: LearnedKeys(s, self.tokens, self.dropout) for name, s in seen.items()}
