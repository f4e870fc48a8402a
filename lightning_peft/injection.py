"""What a callback or a PEFTModule is asked to inject: plain settings, stored in checkpoints."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_peft.adapter import Adapter
from lightning_peft.config import instantiate, to_spec
from lightning_peft.method import Method, inject
from lightning_peft.strategies.checks import refuse_wrapped
from lightning_peft.targets import Patterns, as_patterns


@dataclass(frozen=True)
class Injection:
    """The arguments of `inject`, and where in the LightningModule the model is."""

    methods: tuple[Method, ...]
    """The methods, in order."""

    name: str = "default"
    """The adapter's name."""

    train: Patterns = ()
    """Patterns of further modules or parameters that are trained in place."""

    head: bool = True
    """Whether the fresh task head is trained in place."""

    within: str = ""
    """The attribute of the LightningModule to inject; empty for the LightningModule itself."""

    def into(self, model: nn.Module) -> Adapter:
        """Inject into `model`, which must not be wrapped or sharded yet."""
        refuse_wrapped(model)
        return inject(model, self.methods, self.name, train=self.train, head=self.head)

    def to_spec(self) -> dict[str, Any]:
        """Return the settings in plain containers."""
        return {
            "name": self.name,
            "methods": [to_spec(method) for method in self.methods],
            "train": list(as_patterns(self.train)),
            "head": self.head,
        }

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> "Injection":
        """Return the settings that `to_spec` gave."""
        methods = tuple(instantiate(method) for method in spec["methods"])
        return cls(methods, spec["name"], tuple(spec["train"]), spec["head"])


def as_methods(methods: Method | Sequence[Method]) -> tuple[Method, ...]:
    """Return one method or several as a tuple."""
    return (methods,) if isinstance(methods, Method) else tuple(methods)
