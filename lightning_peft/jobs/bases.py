"""The base that an adapter's folder was trained on, built from what the folder says of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from lightning_peft.errors import CheckpointError, ConfigError
from lightning_peft.files.adapter_folder import CONFIG, THEIR_CONFIG
from lightning_peft.files.folder_io import TENSORS, read_json
from lightning_peft.models import ModelSource

_BY_TASK = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""The classes for the tasks that peft names."""

_HEADS = ("classifier", "score", "classifier.out_proj", "out_proj", "head", "fc")
_COUNTED = ("SequenceClassification", "TokenClassification", "ImageClassification")


def base_for(source: ModelSource, folder: Path) -> nn.Module:
    """Return the pretrained model of the class that the adapter in `folder` was trained in.

    A head gets as many labels as the adapter has trained.

    Raises:
        CheckpointError: the folder does not say which class that is.
        ConfigError: the model cannot be loaded.
    """
    cls = class_of(folder)
    labels = _labels(folder) if any(word in cls for word in _COUNTED) else None
    return source.load(cls, **({} if labels is None else {"num_labels": labels}))


def class_of(folder: Path) -> str:
    """Return the class of the model that the adapter in `folder` was trained in.

    Raises:
        CheckpointError: the folder does not say.
    """
    if (folder / CONFIG).exists():
        known: Any = read_json(folder / CONFIG).get("base", {}).get("class")
    else:
        known = _theirs(read_json(folder / THEIR_CONFIG))
    if not known:
        raise CheckpointError(
            f"`{folder}` does not say which class of model it was trained in: load the base with "
            "your own code, and call `load_adapter` and `merging.merge`."
        )
    return str(known)


def require_folder(folder: str | Path) -> Path:
    """Return an adapter's folder.

    Raises:
        ConfigError: it is none.
    """
    path = Path(folder).expanduser()
    if not (path / TENSORS).is_file():
        raise ConfigError(f"`{path}` must be the folder of an adapter, but holds no `{TENSORS}`.")
    return path


def _theirs(config: Mapping[str, Any]) -> str | None:
    found = (config.get("auto_mapping") or {}).get("base_model_class")
    return found or _BY_TASK.get(str(config.get("task_type")))


def _labels(folder: Path) -> int | None:
    try:
        with safe_open(folder / TENSORS, "pt") as file:
            ends = tuple(f"{head}.weight" for head in _HEADS)
            heads = [name for name in file.keys() if name.endswith(ends)]  # noqa: SIM118
            shapes = [file.get_slice(name).get_shape() for name in heads]
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"`{folder / TENSORS}` cannot be read: {error}.") from error
    return shapes[-1][0] if shapes else None
