from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsmn_dist.foundation.redact import HIDDEN, is_secret_name, redact, redact_patterns, redact_value

SECRET_NAMES = [
    *(
        "MLFLOW_TRACKING_PASSWORD",
        "RAY_AUTH_TOKEN",
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "OPENAI_API_KEY",
        "WANDB_API_KEY",
    ),
    *(
        "password",
        "db.password",
        "hubToken",
        "client-secret",
        "s3.access_key",
        "Authorization",
        "MLFLOW_FLASK_SERVER_SECRET_KEY",
    ),
]
PLAIN_NAMES = [
    *(
        "max_target_tokens",
        "tokenizer",
        "vocab_size",
        "num_keys",
        "key",
        "sort_key",
        "monkey",
        "RAY_AUTH_TOKEN_PATH",
        "token_file",
    ),
    *("MLFLOW_ADMIN_PASSWORD_FILE", "tokens_per_second", "pad_token_id", "", "...", "SECRET_NAME", "num_heads"),
]


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_names_of_secrets_are_known(name: str) -> None:
    assert is_secret_name(name)
    assert redact(f"x {name}=hunter2hunter2 y") == f"x {name}={HIDDEN} y"
    assert redact_value({name: "hunter2"}) == {name: HIDDEN}


@pytest.mark.parametrize("name", PLAIN_NAMES)
def test_settings_of_this_field_stay_readable(name: str) -> None:
    assert not is_secret_name(name)
    assert redact_value({name: "a text"}) == {name: "a text"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgresql://u:s3cr&t!@host/db", f"postgresql://u:{HIDDEN}@host/db"),
        ("to http://a:b@h and https://c:d@i", f"to http://a:{HIDDEN}@h and https://c:{HIDDEN}@i"),
        ("postgresql://host:5432/db?user=u@h", "postgresql://host:5432/db?user=u@h"),
        ("s3://bucket/path", "s3://bucket/path"),
        ("Authorization: Bearer abcdefgh123", f"Authorization: Bearer {HIDDEN}"),
        ("{'Authorization': 'Basic dXNlcjpwYXNz'}", f"{{'Authorization': 'Basic {HIDDEN}'}}"),
        ("error: HF_TOKEN=abc", f"error: HF_TOKEN={HIDDEN}"),
        ('{"api_key": "abcdef"}', f'{{"api_key": "{HIDDEN}"}}'),
        ("GET /x?token=abcdef&page=2", f"GET /x?token={HIDDEN}&page=2"),
        ("loss per token: 2.31, token=17", "loss per token: 2.31, token=17"),
        ("no token: see the page", "no token: see the page"),
        ("training.max_steps=30 at http://127.0.0.1:8265", "training.max_steps=30 at http://127.0.0.1:8265"),
    ],
)
def test_texts(text: str, expected: str) -> None:
    assert redact_patterns(text) == expected
    assert redact_patterns(expected) == expected, "hiding twice changes nothing"


def test_values_of_the_environment_are_hidden_wherever_they_stand(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text("from-a-file-1234\n")
    monkeypatch.setenv("SOME_PASSWORD", "correct horse battery")
    monkeypatch.setenv("LONGER_PASSWORD", "correct horse battery staple")
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    monkeypatch.setenv("COUNT_TOKEN", "1234567890")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    monkeypatch.setenv("GONE_SECRET_FILE", str(tmp_path / "gone"))
    said = redact(f"login of correct horse battery staple, from-a-file-1234 in {file}, abc, 1234567890")
    assert said == f"login of {HIDDEN}, {HIDDEN} in {file}, abc, 1234567890"


def test_nested_values_keep_their_shape() -> None:
    value = {
        "tracking": {"uri": "postgresql://u:pw@h/db", "tags": {"hub_token": "abc"}},
        "sizes": [1, 2.5, None, True],
        "words": ("a", "password=abcdef"),
        "secret": {"inner": 3},
        "token": 5,
    }
    assert redact_value(value) == {
        "tracking": {"uri": f"postgresql://u:{HIDDEN}@h/db", "tags": {"hub_token": HIDDEN}},
        "sizes": [1, 2.5, None, True],
        "words": ("a", f"password={HIDDEN}"),
        "secret": {"inner": 3},
        "token": 5,
    }
    assert value["tracking"]["uri"] == "postgresql://u:pw@h/db", "the value itself is left alone"  # type: ignore[index]


@pytest.mark.parametrize(
    "text", ["a" * 200_000, "a.b-" * 50_000, "token" * 40_000, "://" * 60_000, "=" * 200_000, "a:" * 99_999]
)
def test_long_lines_take_no_long_time(text: str) -> None:
    began = time.perf_counter()
    redact(text)
    assert time.perf_counter() - began < 5.0


@given(st.text())
def test_any_text_is_taken_and_hiding_twice_changes_nothing(text: str) -> None:
    once = redact_patterns(text)
    assert redact_patterns(once) == once


@given(st.text(alphabet=st.characters(whitelist_categories=("Lu", "Ll", "Nd")), min_size=8))
def test_a_password_never_survives(password: str) -> None:
    if password.isdigit() or password.lower() in "password://user@host":
        return
    text = redact_patterns(f"postgresql://user:{password}@host/db DB_PASSWORD={password} 'password': '{password}'")
    assert text == f"postgresql://user:{HIDDEN}@host/db DB_PASSWORD={HIDDEN} 'password': '{HIDDEN}'"
