"""A method that a user wrote in a package of their own."""

from dataclasses import dataclass

from lightning_peft.methods.lora import LoRA


@dataclass(frozen=True, kw_only=True)
class OwnLoRA(LoRA):
    """LoRA of the user's own."""
