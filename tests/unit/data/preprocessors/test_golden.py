"""Golden examples, written by hand from each dataset's schema: made-up rows always, real rows where they lie beside us.

Each file in `golden/` has `own` (rows made up here, whole examples) and, where real rows were at hand, `real` (their
number, what was skipped, and a few examples told by ids, gold letters, first words or lengths). Files without `real`
(natural_questions, wizardlm) say in `note` that no real row was at hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest

from hsmn_dist.data.example import Example
from hsmn_dist.data.preprocessors.all import get_preprocessor, preprocessor_names
from hsmn_dist.data.preprocessors.base import Row, SkipCounter
from tests.support.golden_rows import golden, golden_names
from tests.support.shared import shared_data

NAMES = golden_names()
WHOLE = ("id", "group", "context", "target", "task", "kind", "meta")


def run(name: str, rows: Iterator[Row] | list[Row]) -> tuple[list[Example], SkipCounter]:
    skipped = SkipCounter()
    return list(get_preprocessor(name)(rows, skipped)), skipped


def real_rows(name: str) -> list[Row]:
    folder = shared_data(golden(name)["real"].get("folder", name))
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    return [Row(f"{name}/rows.jsonl:{number}", json.loads(line)) for number, line in enumerate(lines, 1)]


def check(example: Example, expected: dict[str, Any]) -> None:
    """Compare every key of `expected`; an unknown key is an error of the golden file."""
    got = asdict(example)
    for key, value in expected.items():
        if key in WHOLE:
            assert got[key] == value, key
        elif key == "meta_has":
            assert {name: got["meta"][name] for name in value} == value
        elif key == "choice_set":
            assert sorted(got["meta"]["choices"]) == value
            assert got["meta"]["choices"][got["meta"]["gold"]] == got["target"]
        elif key.startswith("num_"):
            assert len(got["meta"][key.removeprefix("num_")]) == value
        elif key != "index":
            check_text(got, key, value)


def check_text(got: dict[str, Any], key: str, value: Any) -> None:
    part, _, how = key.partition("_")
    text = got[part]
    if how == "starts":
        assert text.startswith(value)
    elif how == "ends":
        assert text.endswith(value)
    elif how == "has":
        assert all(word in text for word in value)
    elif how == "lacks":
        assert not any(word in text for word in value)
    elif how == "length":
        assert len(text) == value
    elif how == "length_at_least":
        assert len(text) >= value
    else:
        raise KeyError(key)


def test_every_one_of_the_33_datasets_has_a_golden_file():
    assert preprocessor_names() == NAMES
    assert len(NAMES) == 33


@pytest.mark.parametrize("name", NAMES)
def test_made_up_rows_give_the_examples_written_by_hand(name):
    own = golden(name)["own"]
    rows = [Row(f"own.jsonl:{number}", value) for number, value in enumerate(own["rows"], 1)]
    examples, skipped = run(name, rows)
    assert len(examples) == len(own["examples"])
    for example, expected in zip(examples, own["examples"], strict=True):
        check(example, expected)
    assert skipped.counts == own["skipped"]


@pytest.mark.parametrize("name", [name for name in NAMES if "real" in golden(name)])
def test_real_rows_give_the_examples_written_by_hand(name):
    real = golden(name)["real"]
    examples, skipped = run(name, real_rows(name))
    assert len(examples) == real["count"]
    assert skipped.counts == real["skipped"]
    for expected in real["examples"]:
        check(examples[expected["index"]], expected)
    assert len({example.id for example in examples}) == len(examples)
    assert all(example.group and example.target.strip() for example in examples)


@pytest.mark.parametrize("name", [name for name in NAMES if "real" not in golden(name)])
def test_a_dataset_without_real_rows_says_so(name):
    assert "No real row was at hand" in golden(name)["note"]
    assert name in ("natural_questions", "wizardlm")


@pytest.mark.parametrize("name", NAMES)
def test_examples_can_be_stored_as_json_and_read_back(name):
    own = golden(name)["own"]
    examples, _ = run(name, [Row(f"own.jsonl:{number}", value) for number, value in enumerate(own["rows"], 1)])
    for example in examples:
        assert Example(**json.loads(json.dumps(asdict(example)))) == example


@pytest.mark.parametrize("name", NAMES)
def test_a_preprocessor_is_lazy_and_reads_no_further_than_one_group_ahead(name):
    rows = golden(name)["own"]["rows"]
    taken = []

    def endless() -> Iterator[Row]:
        for number in range(10_000):
            value = dict(rows[number % len(rows)])
            for key in ("message_tree_id", "question_id", "Chapter"):
                if key in value:  # each round brings new groups
                    value[key] = f"{value[key]}-{number // len(rows)}"
            taken.append(number)
            yield Row(f"own.jsonl:{number}", value)

    examples = get_preprocessor(name)(endless(), SkipCounter())
    assert taken == []
    next(examples)
    assert len(taken) <= 2 * len(rows)
