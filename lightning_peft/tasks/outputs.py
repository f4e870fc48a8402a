"""What the tasks read from a model."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lightning_peft.errors import ConfigError, DataError
from lightning_peft.tasks.task import model_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightning_peft.models import ModelSource


def logits_of(model: nn.Module, batch: Mapping[str, Tensor], shape: str, kind: str) -> Tensor:
    """Run the model and return its logits in float32.

    Args:
        model: Returns an object with `logits`, or these alone.
        batch: Of the task.
        shape: The names of the dimensions that the logits must have: `(batch, labels)`.
        kind: What the model must be for.

    Raises:
        ConfigError: There are no logits, or they have another number of dimensions.
    """
    outputs = model(**model_inputs(batch))
    logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if logits is None or logits.dim() != shape.count(",") + 1:
        found = None if logits is None else tuple(logits.shape)
        raise ConfigError(
            f"`model` must return `logits` of shape {shape}, but {type(model).__name__} returns "
            f"{found} instead: use a model for {kind}."
        )
    return logits.float()


def require_labels(batch: Mapping[str, Tensor], what: str) -> None:
    """Check that a batch has labels.

    Raises:
        DataError: It has none.
    """
    if "labels" not in batch:
        raise DataError(
            f"a batch must have `labels`, but has {', '.join(batch)} instead: give the data "
            f"module the column of the {what}."
        )


def load_head(
    source: "ModelSource", labels: Sequence[str], auto_class: str, **config: str
) -> "PreTrainedModel":
    """Load a base with a fresh head that has an output for each label."""
    return source.load(
        auto_class,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        **config,
    )


def load_classifier(
    source: "ModelSource", labels: Sequence[str], auto_class: str, **config: str
) -> nn.Module:
    """Load a base of texts with a fresh head that has an output for each label."""
    model = load_head(source, labels, auto_class, **config)
    # Decoders read the last token that is not padding, so they must know which one pads.
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = source.tokenizer().pad_token_id
    return model


def check_outputs(model: nn.Module, labels: Sequence[str], setting: str) -> None:
    """Compare the number of labels with that of the head's outputs.

    Raises:
        DataError: They differ.
    """
    outputs = getattr(getattr(model, "config", None), "num_labels", None)
    if outputs is not None and outputs != len(labels):
        raise DataError(
            f"`{setting}` must be as many as the model has outputs ({outputs}), but is "
            f"{', '.join(labels)} instead."
        )
