"""P-tuning in peft's format: what the encoder writes, without the encoder.

peft's files hold no more than that, so they can only be trained on as prompts. An adapter of ours
keeps its encoder in its own file (`Adapter.save`) and is written this way by an export alone.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_peft.files.peft.prompt import (
    arranged,
    before_the_text,
    check_prompt,
    prompt_entries,
    prompt_of,
)
from lightning_peft.files.peft.settings import Settings
from lightning_peft.files.peft.spelling import Entry, Part, Spelling, State
from lightning_peft.files.peft.tokens import EMBEDDINGS, ROOT, deltas_of, with_head
from lightning_peft.method import Method
from lightning_peft.methods.p_tuning import Encoded
from lightning_peft.methods.prompt_tuning import Prompt
from lightning_peft.structure.probe import untouched


class PTuningSpelling(Spelling):
    """`PTuning`, written; a file is read as `PromptTuning`."""

    peft_type: ClassVar[str] = "P_TUNING"
    kinds: ClassVar[tuple[str, ...]] = ("p_tuning",)
    lossless: ClassVar[bool] = False
    base: ClassVar[str] = ROOT

    def config(self, part: Part) -> dict[str, Any]:
        """Return the settings, with those of the encoder that there was."""
        method: Any = part.method
        settings = before_the_text(part)
        return settings | {
            "encoder_dropout": method.dropout,
            "encoder_hidden_size": method.hidden_size or settings["token_dim"],
            "encoder_num_layers": method.layers,
            "encoder_reparameterization_type": method.encoder.upper(),
        }

    def check(self, part: Part) -> None:
        """Compare peft's place of the prompt with ours."""
        check_prompt(part)

    def method(self, settings: Settings, keys: Sequence[str], model: nn.Module) -> Method:
        """Return prompt tuning with peft's layout, by which what was written is trained on."""
        settings.ignore(
            "encoder_dropout", "encoder_hidden_size", "encoder_num_layers",
            "encoder_reparameterization_type",
        )  # fmt: skip
        return prompt_of(settings, model)

    def entries(self, part: Part) -> list[Entry]:
        """Return the entry of the vectors: as written, or of those that a file held."""
        if deltas_of(part, Prompt):
            return prompt_entries(part)
        (delta,) = deltas_of(part, Encoded).values()

        def write(state: State) -> Tensor:
            with untouched(part.model):
                return arranged(part, delta.vectors())

        return with_head(part, [Entry(EMBEDDINGS, None, write, lambda tensor: tensor)])


SPELLING = PTuningSpelling()
