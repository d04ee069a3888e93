"""The table of datasets: complete, consistent, and never training on what is scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hsmn_dist.data.preprocessors.all import preprocessor_names
from hsmn_dist.data.sources import (
    SOURCES,
    all_sources,
    datasets_page,
    get_source,
    known_source,
    may_train,
    require_may_train,
)
from hsmn_dist.foundation.errors import ConfigError
from tests.support.shared import shared_data

ROOT = Path(__file__).resolve().parents[3]
NAMES = [
    "sciq",
    "gsm8k",
    "mmlu",
    "arc_easy",
    "arc_challenge",
    "math",
    "stem",
    "code_search_net",
    "human_eval",
    "mbpp",
    "daily_dialog",
    "personachat",
    "open_assistant",
    "code_alpaca",
    "dolly",
    "truthfulqa",
    "kjv_bible",
    "hellaswag",
    "bigbench_hard",
    "apps",
    "mathqa",
    "wizardlm",
    "strategyqa",
    "codecontests",
    "natural_questions",
    "aqua_rat",
    "ultrafeedback",
    "bbh",
    "wikiqa",
    "open_r1_math",
    "nq_open",
    "owasp",
    "alpaca",
]


def test_the_33_names_have_a_record_and_a_preprocessor_each():
    assert len(NAMES) == 33
    assert sorted(SOURCES) == sorted(NAMES) == preprocessor_names()


@pytest.mark.parametrize("source", all_sources(), ids=lambda source: source.name)
def test_a_record_is_consistent(source):
    assert source.columns and source.metric and source.licence and source.group and source.paper
    if source.hub_id:
        assert set(source.train_splits) <= set(source.splits)
        assert source.evaluation_split in ("", *source.splits)
    assert source.evaluation_split not in source.train_splits
    assert source.train_splits or source.evaluation_split


@pytest.mark.parametrize("source", all_sources(), ids=lambda source: source.name)
def test_no_split_that_is_scored_or_called_test_may_train(source):
    for split in source.splits:
        if split == source.evaluation_split or split.startswith("test") or split.startswith("valid"):
            assert not may_train(source, split), split
    assert not may_train(source, source.evaluation_split or "test")


def test_only_the_three_benchmarks_with_one_split_are_evaluation_only():
    only = {source.name for source in all_sources() if source.is_evaluation_only}
    assert only == {"human_eval", "truthfulqa", "bbh", "bigbench_hard"}


def test_a_local_file_of_unknown_split_may_train_unless_evaluation_only():
    assert may_train(get_source("gsm8k"), "")
    assert not may_train(get_source("truthfulqa"), "")


def test_a_slice_counts_as_its_split():
    assert may_train(get_source("gsm8k"), "train[:100]")
    assert not may_train(get_source("gsm8k"), "test[:100]")


def test_training_on_a_scored_split_is_refused_with_the_splits_that_may():
    with pytest.raises(ConfigError) as caught:
        require_may_train(get_source("mmlu"), "test")
    assert "auxiliary_train" in caught.value.allowed
    with pytest.raises(ConfigError, match="evaluation only"):
        require_may_train(get_source("human_eval"), "test")
    require_may_train(get_source("mmlu"), "auxiliary_train")


def test_an_unknown_name_suggests_the_nearest_and_a_built_in_one_has_no_record():
    with pytest.raises(ConfigError) as caught:
        get_source("hella_swag")
    assert "hellaswag" in caught.value.action
    assert known_source("passkey") is None
    assert known_source("gsm8k") is get_source("gsm8k")


def test_non_commercial_and_unclear_licences_are_marked():
    marked = {source.name: source.licence_class for source in all_sources()}
    assert {name for name, kind in marked.items() if kind == "non-commercial"} == {
        "sciq",
        "daily_dialog",
        "code_alpaca",
        "alpaca",
    }
    assert {name for name, kind in marked.items() if kind == "unclear"} == {"personachat", "wikiqa", "code_search_net"}


@pytest.mark.parametrize("name", NAMES)
def test_the_columns_of_a_record_are_those_of_the_real_rows(name):
    folder = shared_data("bbh" if name == "bigbench_hard" else name)
    path = folder / "rows.jsonl"
    if not path.exists():
        path = folder / "invented.jsonl"
    first = json.loads(path.read_text(encoding="utf-8").split("\n", 1)[0])
    assert list(first) == list(get_source(name).columns)


def test_the_page_of_datasets_is_fresh():
    assert (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8") == datasets_page()


def test_the_page_links_every_dataset_to_its_section():
    page = datasets_page()
    for name in NAMES:
        assert f"[{name}](#{name})" in page
        assert f"\n## {name}\n" in page
