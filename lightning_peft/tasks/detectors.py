"""Detectors: models of transformers that return a class and a box for each of their queries."""

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_peft.errors import ConfigError, near_misses

if TYPE_CHECKING:
    from lightning_peft.models import ModelSource

_AUTO = "AutoModelForObjectDetection"
_CHOSEN = ("out_features", "out_indices", "stage_names")  # by what reads the backbone's layers


def load_detector(
    source: "ModelSource", labels: Sequence[str], settings: Mapping[str, Any] | None
) -> nn.Module:
    """Load a detector with a fresh head for the classes, or build one on a pretrained backbone.

    What is built around the backbone is fresh: the names are in `fresh_parameters`, so an adapter
    trains it in place.

    Args:
        source: A detector, or what becomes the backbone of a new one.
        labels: The classes.
        settings: None for a detector; else those of the new one: `type`, such as `detr` or
            `rf_detr`; `backbone`, settings of it that are not the source's; and any of its own
            configuration.

    Raises:
        ConfigError: The source is no detector, or does not become the backbone of such a one.
    """
    named = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    if settings is None:
        return source.load(_AUTO, **named)
    base = source.load("AutoModel")
    model = _built(base, dict(settings), named)
    backbone = _place_of(base, model)
    model.get_submodule(backbone).load_state_dict(base.state_dict())
    own = {f"{backbone}.{name}" for name, _ in base.named_parameters()}
    model.fresh_parameters = tuple(n for n, _ in model.named_parameters() if n not in own)
    model.config.name_or_path = source.name
    return model.eval()  # the mode that `from_pretrained` returns


def _built(base: Any, settings: dict[str, Any], named: Mapping[str, Any]) -> Any:
    import transformers

    kind, chosen = settings.pop("type", None), settings.pop("backbone", {})
    _require_settings(kind, settings)
    own = {k: v for k, v in base.config.to_dict().items() if k not in _CHOSEN}
    try:
        config = transformers.AutoConfig.for_model(
            str(kind), backbone_config={**own, **chosen}, **settings, **named
        )
        return getattr(transformers, _AUTO).from_config(config, dtype=base.dtype)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"`detector` must be settings of {kind} on {type(base).__name__}, but: {first}"
        ) from error


def _require_settings(kind: Any, settings: Mapping[str, Any]) -> None:
    """Check that there is such a detector, and that it has such settings."""
    import transformers

    kinds = list(_detectors())
    if kind not in kinds:
        raise ConfigError(
            f"`detector.type` must be a detector of transformers ({', '.join(kinds)}), but is "
            f"{kind!r} instead.{near_misses(str(kind), kinds)}"
        )
    known = transformers.AutoConfig.for_model(str(kind)).to_dict()
    for name in settings:
        if name not in known:
            raise ConfigError(
                f"`detector.{name}` must be a setting of {kind}, but is none."
                f"{near_misses(name, known)}"
            )


def _detectors() -> Mapping[str, str]:
    """Return transformers' detectors: kind -> class."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

    return MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES


def _place_of(base: nn.Module, model: nn.Module) -> str:
    """Return the name of the part that has the tensors of `base`."""
    wanted = {name: tensor.shape for name, tensor in base.state_dict().items()}
    for name, module in model.named_modules():
        if {key: tensor.shape for key, tensor in module.state_dict().items()} == wanted:
            return name
    raise ConfigError(
        f"`detector` must have a backbone like {type(base).__name__}, but no part of "
        f"{type(model).__name__} has its tensors: set `detector.backbone`, or take another type."
    )


def is_detector(model: nn.Module) -> bool:
    """Whether the model is one of transformers' detectors."""
    return any(cls.__name__ in _detectors().values() for cls in type(model).__mro__)


def takes_mask(model: nn.Module) -> bool:
    """Whether the model is told what is padding, and thus gives boxes within the image."""
    return "pixel_mask" in inspect.signature(model.forward).parameters


def decoded(logits: Tensor, boxes: Tensor, classes: int, most: int) -> list[dict[str, Tensor]]:
    """Return the objects that a detector sees, the surest first.

    Detectors with an output more than there are classes (DETR, YOLOS) give each query one class or
    none, by a softmax; the others (Deformable DETR, RT-DETR, RF-DETR) score every class by itself.

    Args:
        logits: `(batch, queries, classes)`, or with an output more.
        boxes: `(batch, queries, 4)`, centre, width and height as shares.
        classes: How many there are.
        most: How many objects an image can have.

    Returns:
        For each image `boxes` `(objects, 4)`, left, top, right and bottom as shares, `scores`
        `(objects,)` and `labels` `(objects,)`.
    """
    chooses = logits.shape[-1] == classes + 1
    scores = logits.float().softmax(-1)[..., :-1] if chooses else logits.float().sigmoid()
    if chooses:  # a query has one class: its others are as good as not there
        scores = scores * (scores == scores.amax(-1, keepdim=True))
    best, places = scores.flatten(1).topk(min(most, scores[0].numel()))  # (batch, objects)
    half = boxes[..., 2:].float() / 2
    corners = torch.cat([boxes[..., :2] - half, boxes[..., :2] + half], -1).clamp(0, 1)
    queries = places // classes
    found = corners.gather(1, queries.unsqueeze(-1).expand(-1, -1, 4))
    return [
        {"boxes": box, "scores": score, "labels": label}
        for box, score, label in zip(found, best, places % classes, strict=True)
    ]
