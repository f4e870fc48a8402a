"""Secrets never reach a printed, saved or tracked configuration."""

import pytest
from omegaconf import OmegaConf

from lightning_peft.redact import HIDDEN, redact, redact_arguments


@pytest.mark.parametrize(
    "name", ["token", "hf_token", "api_key", "apiKey", "WANDB_API_KEY", "secret", "db-password"]
)
def test_a_string_below_a_secret_name_is_hidden(name: str) -> None:
    assert redact({"a": [{name: "abc"}]}) == {"a": [{name: HIDDEN}]}


@pytest.mark.parametrize(
    ("name", "value"),
    [("tokens", 20), ("max_tokens", 128), ("tokenizer", "bert"), ("keyboard", "de"), ("key", None)],
)
def test_settings_that_only_sound_like_secrets_stay(name: str, value: object) -> None:
    assert redact({name: value}) == {name: value}


def test_everything_below_a_secret_name_is_hidden() -> None:
    config = {"credentials": {"user": "me", "port": 80}, "secrets": ["a", "b"]}
    assert redact(config) == {
        "credentials": {"user": HIDDEN, "port": 80},
        "secrets": [HIDDEN, HIDDEN],
    }


def test_a_value_that_looks_like_a_token_is_hidden_under_any_name() -> None:
    text = redact({"note": f"use hf_{'a' * 20} at https://me:pw@example.org/x"})["note"]
    assert text == f"use {HIDDEN} at https://{HIDDEN}@example.org/x"


def test_a_secret_read_from_the_environment_is_hidden_under_any_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SERVICE_API_KEY", "0123456789abcdef")
    config = OmegaConf.create({"header": "Bearer ${oc.env:SERVICE_API_KEY}", "r": 8})
    assert redact(config) == {"header": f"Bearer {HIDDEN}", "r": 8}


def test_arguments_keep_their_names() -> None:
    arguments = ["job=fit", "+logger.api_key=abc", "method.prefix.tokens=20", "--multirun"]
    assert redact_arguments(arguments) == [
        "job=fit",
        f"+logger.api_key={HIDDEN}",
        "method.prefix.tokens=20",
        "--multirun",
    ]


def test_the_result_is_a_copy_of_plain_containers() -> None:
    source = OmegaConf.create({"a": {"b": [1, 2.5, True, None, "x"]}})
    result = redact(source)
    assert type(result) is dict
    assert type(result["a"]["b"]) is list
    result["a"]["b"].append(3)
    assert len(source.a.b) == 5
