"""Rows with any values in their columns: an example, a counted skip, or a `DataError` that names the row; nothing else."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hsmn_dist.data.example import Example
from hsmn_dist.data.preprocessors.all import get_preprocessor, preprocessor_names
from hsmn_dist.data.preprocessors.base import Row, SkipCounter
from hsmn_dist.foundation.errors import DataError
from tests.support.golden_rows import golden

KEYS = [
    "text",
    "label",
    "content",
    "role",
    "value",
    "from",
    "input",
    "output",
    "language",
    "solution",
    "token",
    "is_html",
    "short_answers",
    "long_answer",
]
LEAVES = (
    st.none() | st.booleans() | st.integers(-2, 5) | st.sampled_from(["", " ", "A", "a ) 1", "[1]", "{}", "assistant"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=8,
)
JSON_TEXTS = VALUES.map(json.dumps)


def run(name: str, value: dict[str, Any]) -> None:
    skipped = SkipCounter()
    try:
        examples = list(get_preprocessor(name)([Row("damaged.jsonl:5", value)], skipped))
    except DataError as error:
        assert "damaged.jsonl:5" in error.found
        return
    for example in examples:
        assert example.target.strip()
        assert Example(**json.loads(json.dumps(asdict(example)))).id == example.id


@pytest.mark.parametrize("name", preprocessor_names())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_value_in_any_column_is_used_counted_or_refused_by_name(name, data):
    row = copy.deepcopy(data.draw(st.sampled_from(golden(name)["own"]["rows"])))
    for column in data.draw(st.lists(st.sampled_from(sorted(row)), min_size=1, max_size=2, unique=True)):
        row[column] = data.draw(VALUES | JSON_TEXTS)
    run(name, row)


@pytest.mark.parametrize("name", preprocessor_names())
def test_a_column_that_is_taken_away_is_optional_or_named(name):
    for row in golden(name)["own"]["rows"]:
        for column in row:
            run(name, {key: value for key, value in row.items() if key != column})
