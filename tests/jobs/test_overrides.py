"""What is spelled as an override is read back by Hydra's own parser."""

from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from lightning_peft.errors import ConfigError
from lightning_peft.jobs.overrides import overrides, spelled

TEXTS = st.text() | st.text(alphabet="\\'\"${}[]:=, \n\té", max_size=8)
NAMES = st.from_regex(r"[a-z_][a-z0-9_]{0,5}", fullmatch=True).filter(
    lambda name: name not in ("true", "false", "null", "nan", "inf")
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


def read(override: str) -> tuple[str, Any]:
    found = OverridesParser.create().parse_override(override)
    return found.key_or_group, found.value()


@given(VALUES)
def test_what_is_spelled_is_read_back(value: Any) -> None:
    assert repr(read(f"x={spelled(value)}")) == repr(("x", value))


def test_nested_settings_are_overrides_one_by_one() -> None:
    settings = {"optimizer": {"lr": 1e-5, "name": "it's"}, "task": {"weights": {"a b": 1, "x": 2}}}
    assert dict(map(read, overrides(settings))) == {
        "optimizer.lr": 1e-5,
        "optimizer.name": "it's",
        "task.weights": {"a b": 1, "x": 2},
    }
    assert overrides({"empty": {}}) == ["empty={}"]


@pytest.mark.parametrize("key", ["é", "", "1", "true", "a'b"])
def test_a_key_without_a_spelling_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="give such settings in a file"):
        spelled([{key: 1}])
