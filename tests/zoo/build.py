"""One tiny model of any architecture, with inputs that it takes."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.exceptions import SETTINGS, UNAVAILABLE
from tests.zoo.inputs import inputs_for, padded
from tests.zoo.shrink import LABELS, shrink

CLASSIFIES = ("sequence classification", "token classification", "image classification")
_OUTPUTS = ("logits", "question_answering_score")


class Unavailable(Exception):
    """The model cannot be built or run here: a package is missing, or it needs a GPU."""


@dataclass
class Cell:
    """A tiny model in eval mode with random weights, and inputs that it takes by keyword."""

    head: str
    name: str
    model: nn.Module
    inputs: dict[str, Tensor]
    padded: dict[str, Tensor] | None

    def loss(self) -> Tensor:
        """Return the loss on the full batch; one made up where the model computes none."""
        output = self.model(**self.inputs)
        loss: Tensor | None = getattr(output, "loss", None)
        return output[0].square().mean() if loss is None else loss

    def logits(self, inputs: dict[str, Tensor] | None = None) -> Tensor:
        """Return the logits without a graph; of question answering, start and end logits."""
        with torch.no_grad(), quiet():
            output = self.model(**(self.inputs if inputs is None else inputs))
        if "start_logits" in output:
            return torch.stack([output["start_logits"], output["end_logits"]], -1)
        return next((output[key] for key in _OUTPUTS if key in output), output[0])


def build(head: str, name: str) -> Cell:
    """Return the tiny model of a class, the same in every call.

    Raises:
        Unavailable: the model cannot run here.
    """
    import transformers

    if name in UNAVAILABLE:
        raise Unavailable(UNAVAILABLE[name])
    cls: Any = getattr(transformers, name)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        config = shrink(cls.config_class, **SETTINGS.get(name, {}))
        if head in CLASSIFIES:
            config.num_labels = LABELS
        if head == "causal LM" and hasattr(config, "is_decoder"):
            config.is_decoder = True
        model = cls(config)
        inputs = inputs_for(head, model)
        _fill(model)
        _calibrate(model, inputs)
    pad = getattr(config.get_text_config(), "pad_token_id", None) or 0
    return Cell(head, name, model.eval(), inputs, padded(inputs, pad))


def _fill(model: nn.Module) -> None:
    """Give matrices that start at zero the values of trained ones, for gradients to pass."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(std=0.02)


def _calibrate(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Fit the statistics of batch norms: with those of no data, deep models pass no gradient."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        with torch.no_grad():
            model.train()(**inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        if norm.running_var is not None:  # what never varied would be blown up once it does
            norm.running_var.clamp_(min=0.01)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what other packages warn about and log."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
