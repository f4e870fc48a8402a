"""What the docs promise about the methods, held to the code."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from lightning_peft.config import find_target

ROOT = Path(__file__).parents[1]
METHODS = sorted((ROOT / "conf" / "method").glob("*.yaml"))
PAGES = ROOT / "docs" / "methods"


@pytest.mark.parametrize("file", METHODS, ids=lambda file: file.stem)
def test_every_method_has_a_page_that_explains_its_settings(file: Path) -> None:
    page = (PAGES / f"{file.stem}.md").read_text(encoding="utf-8")
    assert f"method={file.stem}" in page
    config = yaml.safe_load(file.read_text(encoding="utf-8"))["method"]
    if len(config) == 1:  # a recipe explains its parts in their own pages
        (spec,) = config.values()
        fields = {field.name for field in dataclasses.fields(find_target(spec["_target_"]))}
        settings = page.partition("## Settings")[2]
        assert set(re.findall(r"^\| `(\w+)` \|", settings, re.MULTILINE)) == fields


def test_the_index_lists_every_method() -> None:
    index = (PAGES / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| \[(\w+)\]", index, re.MULTILINE)) == {f.stem for f in METHODS}


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda p: p.name
)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target
