"""What each method trains in MiniLM with its default settings, as a Markdown table.

    .venv/bin/python tests/benchmarks/sizes.py

The table of `docs/methods/README.md`. The head is left out; *merges* says whether the change can be
folded into the base's weights.
"""

from pathlib import Path

import yaml
from sst2_run import minilm
from transformers import AutoModel
from transformers.utils import logging

from lightning_peft import Adapter, BottleneckAdapter, inject
from lightning_peft.config import instantiate
from lightning_peft.delta import NotMergeable
from lightning_peft.jobs.conf import description
from lightning_peft.report import readable_bytes, readable_share

CONF = Path(__file__).parents[2] / "conf" / "method"


def main() -> None:
    logging.disable_progress_bar()
    print("| `method=` | what it is | trained | share | bytes | merges |")
    print("| --- | --- | ---: | ---: | ---: | --- |")
    for file in sorted(CONF.glob("*.yaml")):
        print(row(file))


def row(file: Path) -> str:
    """Return a method's line of the table."""
    model = AutoModel.from_pretrained(minilm())
    whole = sum(p.numel() for p in model.parameters())
    config = yaml.safe_load(file.read_text("utf-8"))["method"]
    methods = [instantiate(spec) for spec in config.values()]
    for name in ("one", "two") if any(method.builds_on_adapters for method in methods) else ():
        inject(model, BottleneckAdapter(), name, head=False)
    adapter = inject(model, methods, head=False)
    trained, size = adapter.num_parameters, readable_bytes(adapter.num_bytes)
    return (
        f"| [{file.stem}]({file.stem}.md) | {description(file)} | {trained:,} "
        f"| {readable_share(trained, whole)} | {size} | {'yes' if merges(adapter) else 'no'} |"
    )


def merges(adapter: Adapter) -> bool:
    """Whether the change can be folded into the base's weights."""
    try:
        adapter.merge()
    except NotMergeable:
        return False
    return True


if __name__ == "__main__":
    main()
