"""Every option of every group composes, and builds what it names."""

import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lightning_peft.config import check_settings, find_target, instantiate
from lightning_peft.jobs.conf import Conf, description, own_folder
from lightning_peft.jobs.list import field_docs
from lightning_peft.jobs.saved import CONFIG

CONF = Conf(own_folder())
OPTIONS = [(group, option) for group in CONF.groups() for option in CONF.options(group)]
_TEXTS = "{_target_: lightning_peft.data.classification.ClassificationData, path: x.csv}"
_LABELS = "{_target_: lightning_peft.tasks.sequence_classification.SequenceClassification}"
FILL = {
    ("model", "hf"): ["model.name=x"],
    ("data", "hub"): ["data.hub=x"],
    ("data", "several"): [f"data.of={{a: {_TEXTS}}}"],
    ("data", "own"): [
        "data._target_=lightning_peft.data.classification.ClassificationData",
        "+data.path=x.csv",
    ],
    ("task", "several"): [f"task.tasks={{a: {_LABELS}}}"],
    ("task", "custom"): ["task.loss=lightning_peft.tasks.outputs.logits_of"],
}
"""What a user must give."""

OF_PARTS = (("data", "several"), ("task", "several"), ("task", "custom"))


def composed(group: str, option: str) -> dict[str, Any]:
    given = FILL.get((group, option), [])
    if group == "data" and not given and "path: ???" in CONF.options(group)[option].read_text():
        given = ["data.path=x.csv"]
    config = CONF.compose("train", [f"{group}={option}", *given])
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def test_the_groups_are_those_of_the_design() -> None:
    names = "callbacks data experiment job logger method model task trainer"
    assert CONF.groups() == names.split()


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_an_option_composes_and_says_what_it_is(group: str, option: str) -> None:
    line = description(CONF.options(group)[option])
    assert 10 < len(line) <= 100
    settings = composed(group, option)
    for where, spec in targets(settings, ""):
        known = find_target(spec["_target_"], where)
        # The constructor itself must take every setting; heavy ones are built elsewhere.
        settings = {name: v for name, v in filled(spec).items() if name != "_target_"}
        check_settings(known, settings, where)


@pytest.mark.parametrize("group", ["model", "method", "task", "data", "logger", "callbacks", "job"])
def test_the_options_of_a_group_can_be_built(
    group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for option in CONF.options(group):
        if (group, option) in OF_PARTS:  # tested where a user's parts are there
            continue
        settings = composed(group, option)[group]
        built = {n: filled(s) if isinstance(s, dict) else s for n, s in settings.items()}
        if option == "wandb":
            built["wandb"]["offline"] = True
        instantiate(built, group)
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()


@pytest.mark.parametrize("option", CONF.options("method"))
def test_a_methods_file_shows_every_setting_with_its_default(option: str) -> None:
    (name, spec), *others = composed("method", option)["method"].items()
    if others:  # a recipe of several methods sets its own values
        return
    built = instantiate(spec, f"method.{name}")
    assert built == type(built)()
    assert name == built.kind
    documented = field_docs(type(built))
    settings = set(spec) - {"_target_"}
    assert settings == set(names(type(built)))
    assert all(documented.get(setting) for setting in settings)


def test_methods_keep_the_order_of_the_command_line() -> None:
    for order in (["lora", "freeze"], ["freeze", "lora"]):
        config = CONF.compose("train", [f"method=[{','.join(order)}]"])
        assert list(config.method) == order


def test_the_processor_runs_what_needs_no_gpu(tmp_path: Path) -> None:
    for option in ("cpu", "ddp", "model_parallel"):
        trainer = instantiate(composed("trainer", option)["trainer"] | {"logger": False}, "trainer")
        assert trainer.num_devices == (1 if option == "cpu" else 2)


def test_our_folder_holds_no_saved_run() -> None:
    assert not list(CONF.own.rglob(CONFIG))


def targets(settings: Any, where: str) -> list[tuple[str, dict[str, Any]]]:
    found = [(where, settings)] if isinstance(settings, dict) and "_target_" in settings else []
    for key, value in settings.items() if isinstance(settings, dict) else ():
        found += targets(value, f"{where}.{key}")
    return found


def filled(spec: dict[str, Any]) -> dict[str, Any]:
    """Return a part with the values that a run gives where the file says null."""
    run = {"folder": "run", "dirpath": "run", "monitor": "val/loss", "mode": "min"}
    given = {name: value for name, value in run.items() if spec.get(name, "") is None}
    return {n: v for n, v in spec.items() if not targets(v, n)} | given


def names(target: Any) -> list[str]:
    return list(inspect.signature(target).parameters)
