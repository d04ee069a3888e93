"""Secrets do not reach what this program writes: logs, error messages, tracebacks, journals, tracked parameters.

Hidden are (1) the values of names such as `api_key`, `DB_PASSWORD`, `HF_TOKEN`, written as `name=value`, `name: value` or in a mapping;
(2) the password of a URL, `scheme://user:password@host`; (3) what follows `Bearer` or `Basic`; (4) wherever it stands, the value of an
environment variable with such a name, and the content of a small file that one ending in `_FILE` or `_PATH` names.

Unusual: in this field a token is mostly a piece of text, so `max_target_tokens`, `tokenizer` and every number stay readable: a name is
secret by its whole words, and a value only when it is text. This is the one file beside the launchers that reads the environment, and
only to know what to hide (docs/decisions/0083).
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HIDDEN = "[hidden]"
MIN_VALUE_LENGTH = 8
MAX_FILE_BYTES = 4096

_WORDS = {"password", "passwd", "passphrase", "secret", "token", "credential", "credentials", "apikey", "authorization"}
_KEYS = (
    "api_key",
    "access_key",
    "secret_key",
    "private_key",
    "account_key",
    "encryption_key",
    "signing_key",
    "auth_key",
)
_PLACES = ("path", "file", "dir", "folder", "name", "mode", "ref", "id", "ids", "count", "type", "url", "uri")
# The look-behinds and bounds keep the patterns linear on long lines without spaces.
_NAME = r"(?<![A-Za-z0-9_.\-])[A-Za-z][A-Za-z0-9_.\-]{0,79}"
_ASSIGNED = re.compile(rf"""(?P<name>{_NAME})(?P<sign>["']?[ \t]{{0,8}}[=:][ \t]{{0,8}}["']?)""")
_VALUE = re.compile(r"""[^\s"',;&)}\]]+""")
_URL = re.compile(
    r"(?P<scheme>(?<![A-Za-z0-9+.\-])[A-Za-z][A-Za-z0-9+.\-]{0,30}://)(?P<user>[^\s/@:'\"]*):(?P<password>[^\s/@'\"]+)@"
)
_SCHEME = re.compile(r"\b(?P<scheme>Bearer|Basic)\s+(?P<value>[A-Za-z0-9+/=._~\-]{8,})", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?[0-9.][0-9.eE+\-_]*")


@functools.lru_cache(maxsize=4096)  # each line of a log asks for every variable of the environment
def is_secret_name(name: str) -> bool:
    """Whether a setting, header or variable of that name holds a secret: `hub_token` does, `num_tokens` and `token_file` do not."""
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    words = [word for word in re.split(r"[^a-z0-9]+", snake) if word]
    if not words or words[-1] in _PLACES:
        return False
    # In an environment variable's name, KEY at the end is a key; in a setting it is more often a key of a mapping.
    ends_in_key = name.isupper() and words[-1] == "key"
    return not _WORDS.isdisjoint(words) or ends_in_key or any("_".join(words).endswith(key) for key in _KEYS)


def redact(text: str) -> str:
    """`text` with every secret in it replaced by `[hidden]`."""
    for value in _secret_values():
        text = text.replace(value, HIDDEN)
    return redact_patterns(text)


def redact_patterns(text: str) -> str:
    """As `redact`, by the form of the text alone: the environment is not asked."""
    text = _URL.sub(lambda match: f"{match['scheme']}{match['user']}:{HIDDEN}@", text)
    text = _SCHEME.sub(lambda match: f"{match['scheme']} {HIDDEN}", text)
    parts, position = [], 0
    for match in _ASSIGNED.finditer(text):
        # What stands after a name that is no secret is looked at again: `error: HF_TOKEN=...` has one inside.
        if match.start() < position or not is_secret_name(match["name"]):
            continue
        value = _VALUE.match(text, match.end())
        if value is not None and _is_secret_value(value[0], "=" in match["sign"]):
            parts += [text[position : match.end()], HIDDEN]
            position = value.end()
    return "".join([*parts, text[position:]])


def redact_value(value: Any, name: str = "") -> Any:
    """Plain data (mappings, lists, text, numbers) with its secrets hidden; a new object where something changes."""
    if isinstance(value, Mapping):
        return {key: redact_value(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redact_value(inner, name) for inner in value)
    if isinstance(value, str):
        return HIDDEN if value and is_secret_name(name) else redact(value)
    return value


def _is_secret_value(value: str, is_assigned: bool) -> bool:
    """A number is none, nor what is hidden already, nor a short word after a colon ("no token: see the page")."""
    if _NUMBER.fullmatch(value) or value.startswith(HIDDEN.rstrip("]")) or value.lower() in ("bearer", "basic"):
        return False
    return is_assigned or len(value) >= 6


def _secret_values() -> list[str]:
    """Values to hide wherever they stand, the longest first, so that no part of one is left."""
    values = set()
    for name, value in os.environ.items():
        stem, _, last = name.rpartition("_")
        if last in ("FILE", "PATH") and is_secret_name(stem):
            value = _content(value)
        elif not is_secret_name(name):
            continue
        if len(value) >= MIN_VALUE_LENGTH and not _NUMBER.fullmatch(value):
            values.add(value)
    return sorted(values, key=len, reverse=True)


@functools.lru_cache(maxsize=16)
def _content(path: str) -> str:
    """Text of a small file; empty where there is none."""
    try:
        file = Path(path).expanduser()
        return file.read_text(encoding="utf-8").strip() if file.stat().st_size <= MAX_FILE_BYTES else ""
    except (OSError, ValueError):
        return ""
