"""Weights in llama.cpp's GGUF format: unpacked once, into a folder as `save_pretrained` leaves it.

transformers reads such a file in plain Python, entry by entry, which takes about half a minute for
SmolLM2-135M and its 49,152 tokens; the unpacked folder loads in about a second.
"""

import io
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import Any

from lightning_peft.errors import require

_WEIGHTS = "model.safetensors"


def unpacked(file: Path, digest: str) -> Path:
    """Return a folder with the model and the tokenizer of a GGUF file, their weights in float32.

    It lies among the assets of the hub's cache (`HF_ASSETS_CACHE`), under the file's digest.

    Args:
        file: The file, which holds a causal language model and its tokenizer.
        digest: Its SHA-256.

    Raises:
        MissingExtraError: The package `gguf` is not installed.
    """
    from huggingface_hub import cached_assets_path
    from lightning.pytorch.utilities.rank_zero import rank_zero_info

    folder = cached_assets_path("lightning-peft", namespace="gguf", subfolder=digest)
    if not (folder / _WEIGHTS).is_file():
        require("gguf", "gguf")
        rank_zero_info(f"Unpacking {file.name}, once, to {folder}")
        partial = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            _unpack(file, partial)
            with suppress(OSError):  # another process was faster
                partial.replace(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _unpack(file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given: Any = {"gguf_file": file.name, "trust_remote_code": False}
    with _bar_for_a_person():
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **given)
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype="float32", **given)
    del model.config.quantization_config  # the weights are plain now, and plain ones can be saved
    model.hf_quantizer = None
    tokenizer.model_max_length = model.config.max_position_embeddings  # which a GGUF does not say
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


@contextmanager
def _bar_for_a_person() -> Iterator[None]:
    """Hide a progress bar that no setting hides, where no person watches; logging is not hidden."""
    if sys.stderr.isatty():
        yield
        return
    with redirect_stderr(io.StringIO()):
        yield
