"""One resolver for `_target_`: what it builds, and above all what it refuses."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from lightning_peft import config
from lightning_peft.config import (
    allow_packages,
    find_target,
    instantiate,
    instantiate_as,
    to_spec,
)
from lightning_peft.errors import ConfigError, PEFTError
from lightning_peft.method import Method
from lightning_peft.methods.freeze import Freeze
from lightning_peft.methods.full import FullFineTuning
from lightning_peft.methods.lora import LoRA
from lightning_peft.models import ModelSource
from lightning_peft.structure.targets import Targets
from lightning_peft.tasks.sequence_classification import SequenceClassification


@dataclass(frozen=True, kw_only=True)
class Settings:
    number: int = 1
    share: float | None = None
    kind: Literal["plain", "fancy"] = "plain"
    names: Sequence[str] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    pair: tuple[int, str] = (1, "a")
    anything: Any = None

    def __post_init__(self) -> None:
        if self.number == 13:
            raise ValueError("13 brings bad luck")


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> str:
    """Allow this module's classes; return the `_target_` of `Settings`."""
    monkeypatch.setattr(config, "_user_packages", set())
    allow_packages(__name__)
    return f"{__name__}.Settings"


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "subprocess.Popen",
        "torch.load",
        "torch.hub.load",
        "pickle.loads",
        "urllib.request.urlopen",
        "lightning.pytorch.utilities.rank_zero.rank_zero_only",
        "lightning_peftish.Thing",
        "lightning_peft",
        "torch.optimus.Prime",
        "../os.system",
        "lightning_peft.methods.LoRA()",
        "",
        7,
        None,
    ],
)
def test_refuses_what_is_not_on_the_list(target: Any) -> None:
    with pytest.raises(ConfigError, match=r"`method\._target_` must be a class of lightning_peft"):
        instantiate({"_target_": target}, "method")


@pytest.mark.parametrize(
    "target",
    [
        "lightning_peft.models.Path",  # a class of another package
        "lightning_peft.config.importlib",  # a module
        "lightning_peft.config.instantiate",  # a function
        "lightning_peft.config.ALLOWED",  # a value
        "lightning.pytorch.callbacks.Any",
        "torch.optim.lr_scheduler.partial",
    ],
)
def test_refuses_what_an_allowed_module_only_imports(target: str) -> None:
    with pytest.raises(ConfigError):
        find_target(target)


@pytest.mark.parametrize("where", [None, "targets", "rank_pattern"])
def test_a_strangers_settings_build_nothing_else(where: str | None, tmp_path: Path) -> None:
    """An allowed constructor that writes files must not even be called."""
    spec = {"_target_": "lightning_peft.loggers.wandb_logger", "folder": str(tmp_path / "x")}
    if where is not None:
        spec = {"_target_": "lightning_peft.methods.LoRA", where: [spec]}
    with pytest.raises(ConfigError, match=r"must be a Method|must be settings"):
        instantiate_as(Method, spec, "methods[0]")  # type: ignore[type-abstract]
    assert not (tmp_path / "x").exists()


def test_settings_inside_settings_are_built() -> None:
    method = LoRA(targets=Targets("fc1", layers=(0,)))
    assert instantiate_as(LoRA, to_spec(method)) == method


def test_a_path_through_a_module_reaches_nothing() -> None:
    with pytest.raises(ConfigError, match=r"'lightning_peft\.cli\.os\.system' does not exist"):
        instantiate({"_target_": "lightning_peft.cli.os.system", "command": "true"})


def test_a_refused_target_is_not_imported() -> None:
    code = (
        "import sys\n"
        "from lightning_peft.config import instantiate\n"
        "from lightning_peft.errors import ConfigError\n"
        "for name in ('antigravity.Thing', 'torch.load', 'xmlrpc.client.ServerProxy'):\n"
        "    try: instantiate({'_target_': name})\n"
        "    except ConfigError: continue\n"
        "    raise SystemExit(name)\n"
        "found = {'antigravity', 'torch', 'xmlrpc', 'hydra', 'omegaconf'} & set(sys.modules)\n"
        "raise SystemExit(str(found) if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["", "a b", "os;system", "a..b"])
def test_only_names_of_packages_can_be_allowed(name: str) -> None:
    with pytest.raises(ConfigError, match="`allow`"):
        allow_packages(name)


def test_an_allowed_package_is_the_users_own_choice(allowed: str) -> None:
    assert instantiate({"_target_": allowed, "number": 3}) == Settings(number=3)


def test_unknown_setting_names_near_misses_and_the_field() -> None:
    with pytest.raises(ConfigError, match=r"`method\.lora\.drop` must be a setting of LoRA") as e:
        instantiate({"lora": {"_target_": "lightning_peft.methods.LoRA", "drop": 3}}, "method")
    assert "Did you mean `dropout`?" in str(e.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"number": "three"}, r"`s\.number` must be int, but is 'three' instead"),
        ({"number": True}, "must be int, but is True"),
        ({"number": 2.5}, "must be int, but is 2.5"),
        ({"number": None}, "must be int, but is None"),
        ({"share": "half"}, "must be float or null"),
        ({"kind": "fanci"}, r"must be 'plain' or 'fancy'.*Did you mean `fancy`"),
        ({"names": "abc"}, r"must be Sequence\[str\], but is 'abc'"),
        ({"names": [1]}, r"must be Sequence\[str\]"),
        ({"sizes": {"a": "b"}}, r"must be Mapping\[str, int\]"),
        ({"pair": [1, "a", 2]}, r"must be tuple\[int, str\]"),
        ({"number": "???"}, r"`s\.number` has no value: give it as `s\.number=\.\.\.`"),
        ({"anything": ["<redacted>"]}, r"`s\.anything\[0\]` was not saved, since it is a secret"),
        ({"number": 13}, r"`s` cannot be built: 13 brings bad luck"),
    ],
)
def test_wrong_values_are_named(allowed: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        instantiate({"_target_": allowed, **settings}, "s")


def test_fitting_values_pass(allowed: str) -> None:
    given = {"share": 1, "names": ["a", "b"], "sizes": {"x": 1}, "pair": [2, "b"], "kind": "fancy"}
    built = instantiate({"_target_": allowed, **given})
    assert built == Settings(share=1, names=("a", "b"), sizes={"x": 1}, pair=(2, "b"), kind="fancy")


def test_a_missing_argument_is_named() -> None:
    with pytest.raises(ConfigError, match=r"`model\.name` must be given for ModelSource"):
        instantiate({"_target_": "lightning_peft.models.ModelSource"}, "model")


def test_lightnings_own_errors_about_settings_name_the_place() -> None:
    spec = {"_target_": "lightning.pytorch.Trainer", "accelerator": "cpu", "devices": [0, 1]}
    with pytest.raises(PEFTError, match=r"`trainer` cannot be built: .*devices"):
        instantiate(spec, "trainer")


def test_nested_specs_and_objects_are_built_in_place() -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    callback = {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "monitor": "x"}
    ready = ModelCheckpoint(monitor="y")
    built = instantiate({"a": [callback, ready], "b": {"c": 1}})
    assert built["a"][0].monitor == "x"
    assert built["a"][1] is ready
    assert built["b"] == {"c": 1}


@pytest.mark.parametrize(
    "settings",
    [
        LoRA(r=4, targets=("query", "value"), rank_pattern={"query": 2}, layers=(0, -1)),
        LoRA(targets=Targets(include=("query", "value"), layers=(0, 1))),
        Freeze(layers=1, schedule={1: 2}),
        FullFineTuning(keep_original=True),
        ModelSource(name="somewhere/model", dtype="bfloat16"),
    ],
)
def test_a_settings_object_survives_the_round_trip(settings: Any) -> None:
    spec = to_spec(settings)
    assert _is_plain(spec)
    assert instantiate(spec) == settings


def test_a_method_is_named_by_its_public_place() -> None:
    assert to_spec(LoRA())["_target_"] == "lightning_peft.methods.LoRA"


def test_a_task_survives_the_round_trip() -> None:
    task = SequenceClassification(labels=["bad", "good"])
    again = instantiate(to_spec(task))
    assert type(again) is SequenceClassification
    assert again.labels == ("bad", "good")


def test_what_cannot_be_stored_is_named(allowed: str) -> None:
    with pytest.raises(ConfigError, match="`anything` must be a number, a text"):
        to_spec(Settings(anything=object()))
    with pytest.raises(ConfigError, match="must be a dataclass"):
        to_spec(object())


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)
