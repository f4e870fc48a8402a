"""Weights in llama.cpp's GGUF format: unpacked once, into a folder as `save_pretrained` leaves it.

transformers reads such a file in plain Python, entry by entry, which takes about half a minute for
SmolLM2-135M and its 49,152 tokens; the unpacked folder loads in about a second.
"""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

from lightning_peft.errors import require
from lightning_peft.files.once import built_once


def unpacked(file: Path, digest: str) -> Path:
    """Return a folder with the model and the tokenizer of a GGUF file, their weights in float32.

    It lies among the assets of the hub's cache (`HF_ASSETS_CACHE`), under the file's digest.

    Args:
        file: The file, which holds a causal language model and its tokenizer.
        digest: Its SHA-256.

    Raises:
        MissingExtraError: The package `gguf` is not installed.
    """
    return built_once("gguf", digest, partial(_unpack, file))


def _unpack(file: Path, folder: Path) -> None:
    from lightning.pytorch.utilities.rank_zero import rank_zero_info
    from transformers import AutoModelForCausalLM, AutoTokenizer

    require("gguf", "gguf")
    rank_zero_info(f"Unpacking {file.name}, once, to the hub's cache.")
    given: Any = {"gguf_file": file.name, "trust_remote_code": False}
    with _bar_for_a_person():
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **given)
        model: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype="float32", **given)
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
