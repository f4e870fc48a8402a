"""The card of an adapter in a repository: what is in it, and how to load it."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from lightning_peft.adapter import Adapter
from lightning_peft.config import to_spec
from lightning_peft.redact import redact

_LOAD = """\
# {title}

{what}, trained with lightning-peft: {parameters:,} trained parameters, {size:.1f} MB.

| method | settings |
|---|---|
{methods}
{in_place}
```python
from lightning_peft import load_adapter

adapter = load_adapter(model, "{name}")  # into {base}
```
{theirs}"""

_THEIRS = """
peft reads it too:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(model, "{name}"{subfolder})
```
"""


def card_of(adapter: Adapter, repository: str, subfolder: str, files: Collection[str]) -> str:
    """Return the card's text; paths of this machine and secrets are not in it."""
    base = _base(adapter)
    header: dict[str, Any] = {"library_name": "peft" if "adapter_config.json" in files else None}
    header |= {"base_model": base, "tags": ["lightning-peft", *(m.kind for m in adapter.methods)]}
    described = {key: value for key, value in header.items() if value}
    name = f"{repository}/{subfolder}".rstrip("/")
    inside = f', subfolder="{subfolder}"' if subfolder else ""
    theirs = _THEIRS.format(name=repository, subfolder=inside)
    kinds = [type(method).__name__ for method in adapter.methods]
    body = _LOAD.format(
        title=name.rpartition("/")[2],
        what=f"An adapter ({' and '.join(kinds)})",
        parameters=adapter.num_parameters,
        size=adapter.num_bytes / 1e6,
        methods="\n".join(_row(method) for method in adapter.methods),
        in_place=_in_place(adapter),
        name=name,
        base=f"`{base}`" if base else f"a {type(adapter.model).__name__}",
        theirs=theirs if "adapter_config.json" in files else "",
    )
    return f"---\n{yaml.safe_dump(described, sort_keys=False)}---\n{body}"


def _row(method: Any) -> str:
    settings = redact({k: v for k, v in to_spec(method).items() if k != "_target_"})
    stated = [f"{name} {_short(value)}" for name, value in settings.items() if _says(value)]
    return f"| {type(method).__name__} | {', '.join(stated)} |"


def _says(value: Any) -> bool:
    return value not in (None, False, "", [], {}) and not (
        isinstance(value, str) and Path(value).is_absolute()
    )


def _short(value: Any) -> str:
    text = str(value).replace("|", "\\|").replace("\n", " ")
    return text if len(text) <= 60 else f"{text[:57]}..."


def _in_place(adapter: Adapter) -> str:
    names = [f"`{name}`" for name in adapter.in_place]
    return f"\nTrained in place: {', '.join(names[:6])}{' ...' * (len(names) > 6)}.\n" * bool(names)


def _base(adapter: Adapter) -> str | None:
    """Return the name of the base on the hub; a folder of this machine is nobody's business."""
    name = str(getattr(getattr(adapter.model, "config", None), "name_or_path", "") or "")
    local = not name or name.count("/") > 1 or Path(name).is_absolute() or Path(name).exists()
    return None if local else name
