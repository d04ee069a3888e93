"""Reference scores: no number without its source and conditions."""

from __future__ import annotations

import json

import pytest
import yaml

from hsmn_dist.evaluation.reference_scores import (
    NOT_STATED,
    REQUIRED,
    VERIFICATIONS,
    load_reference_scores,
    reference_rows,
)
from hsmn_dist.foundation.errors import DataError

GOOD = {
    "benchmark": "mmlu",
    "model": "Some Model",
    "score": 0.5,
    "metric": "accuracy",
    "split": "test",
    "shots": 5,
    "source": "A paper, Table 1",
    "url": "https://example.org/paper",
    "date": "2024-01",
    "verification": "verified",
}

# What the original system compares itself with, in percent.
ORIGINAL = {
    "mmlu": [70.0, 86.4, 86.5, 88.7, 90.2, 86.8, 88.7, 81.9, 89.8, 92.7],
    "arc_easy": [85.2, 96.3, 95.0, 94.0, 93.5],
    "arc_challenge": [85.2, 96.3, 94.8, 93.0, 92.0],
    "gsm8k": [57.1, 92.0, 94.0, 95.0, 96.4, 91.7, 89.3],
    "human_eval": [48.1, 67.0, 90.2, 84.9, 92.0, 71.9, 86.5],
    "mbpp": [75.0, 80.0, 78.0, 76.0],
    "truthfulqa": [47.0, 59.0, 60.0, 62.0, 58.0],
}


def written(tmp_path, *rows, sources=None):
    path = tmp_path / "scores.yaml"
    path.write_text(yaml.safe_dump({"sources": sources or {}, "rows": list(rows)}), encoding="utf-8")
    return path


def test_the_packaged_file_loads_and_every_row_has_its_conditions():
    scores = load_reference_scores()
    assert len(scores) > 60
    for score in scores:
        assert all(str(getattr(score, name)) for name in REQUIRED)
        assert score.verification in VERIFICATIONS
        if score.verification == "verified":
            assert NOT_STATED not in (score.metric, score.split, score.shots, score.date)
            assert score.url.startswith("https://")


@pytest.mark.parametrize("benchmark", sorted(ORIGINAL))
def test_every_number_of_the_original_list_is_there_once_traced_or_marked(benchmark):
    left = [round(100 * score.score, 1) for score in load_reference_scores() if score.benchmark == benchmark]
    for percent in ORIGINAL[benchmark]:
        assert percent in left
        left.remove(percent)


def test_numbers_that_are_listed_without_a_source_are_unverified():
    for score in load_reference_scores():
        assert ("names no source" in score.source) == (score.verification == "unverified")


def test_small_open_models_are_there_for_a_fair_comparison():
    models = {score.model for score in load_reference_scores() if score.verification == "verified"}
    assert {"Pythia 70M", "Pythia 160M", "Pythia 410M", "OPT 125M", "OPT 1.3B"} <= models
    assert {"HOPE 760M", "HOPE 1.3B"} <= {score.model for score in load_reference_scores()}


def test_rows_of_some_benchmarks_are_json_with_verified_ones_first():
    rows = reference_rows(["arc_easy", "gsm8k"])
    assert {row["benchmark"] for row in rows} == {"arc_easy", "gsm8k"}
    order = [VERIFICATIONS.index(row["verification"]) for row in rows if row["benchmark"] == "gsm8k"]
    assert order == sorted(order)
    assert json.loads(json.dumps(rows)) == rows


@pytest.mark.parametrize("name", REQUIRED)
def test_a_row_that_lacks_something_is_refused_and_named(tmp_path, name):
    row = {key: value for key, value in GOOD.items() if key != name}
    with pytest.raises(DataError) as caught:
        load_reference_scores(written(tmp_path, GOOD, {**row, "model": "Other"} if name != "model" else row))
    assert f"row 2: no {name}" in caught.value.found


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"score": 86.4}, "not a number in"),
        ({"score": True}, "not a number in"),
        ({"benchmark": "mmul"}, "did you mean 'mmlu'"),
        ({"verification": "sure"}, "not one of"),
        ({"shots": -1}, "not a count"),
        ({"shots": "five"}, "not a count"),
        ({"date": "March 2024"}, "not YYYY"),
        ({"shots": "not stated"}, "a verified row whose shots"),
        ({"split": "not stated"}, "a verified row whose split"),
        ({"url": ""}, "a verified row whose url"),
        ({"colour": "blue"}, "unknown keys colour"),
    ],
)
def test_a_row_that_makes_no_sense_is_refused(tmp_path, change, problem):
    with pytest.raises(DataError, match=problem):
        load_reference_scores(written(tmp_path, {**GOOD, **change}))


def test_an_unverified_row_may_say_that_nothing_is_stated(tmp_path):
    row = {**GOOD, "metric": NOT_STATED, "split": NOT_STATED, "shots": NOT_STATED, "date": NOT_STATED}
    (score,) = load_reference_scores(written(tmp_path, {**row, "verification": "unverified"}))
    assert score.shots == NOT_STATED


def test_a_source_can_be_named_once_and_must_be_whole(tmp_path):
    row = {key: value for key, value in GOOD.items() if key not in ("url", "date")} | {"source": "paper"}
    whole = {"paper": {"title": "A paper", "url": "https://example.org", "date": "2024"}}
    (score,) = load_reference_scores(written(tmp_path, row, sources=whole))
    assert (score.source, score.date) == ("A paper", "2024")
    with pytest.raises(DataError, match="no date"):
        load_reference_scores(written(tmp_path, row, sources={"paper": {"title": "A paper"}}))


def test_the_same_number_twice_is_refused(tmp_path):
    with pytest.raises(DataError, match="as row 1"):
        load_reference_scores(written(tmp_path, GOOD, {**GOOD, "score": 0.6}))


def test_a_file_of_another_form_is_refused(tmp_path):
    path = tmp_path / "scores.yaml"
    path.write_text("- 1\n- 2\n", encoding="utf-8")
    with pytest.raises(DataError, match="no list `rows`"):
        load_reference_scores(path)
