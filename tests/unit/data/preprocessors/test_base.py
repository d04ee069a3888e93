"""The signature that all preprocessors share: rows, skips, columns, ids."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from hsmn_dist.data.preprocessors.all import get_preprocessor, preprocessor_names
from hsmn_dist.data.preprocessors.base import (
    PREPROCESSORS,
    Row,
    SkipCounter,
    adjacent_columns,
    column,
    digest,
    integer,
    maybe_text,
    require_usable,
    row_id,
    text,
    text_list,
)
from hsmn_dist.foundation.errors import ConfigError, DataError
from tests.support.shared import shared_data


def test_an_unknown_dataset_suggests_the_nearest_name():
    with pytest.raises(ConfigError) as caught:
        get_preprocessor("gms8k")
    assert "did you mean 'gsm8k'" in caught.value.action
    assert "hellaswag" in caught.value.allowed


def test_the_table_is_frozen_after_all_33_are_in_it():
    assert len(preprocessor_names()) == 33
    with pytest.raises(RuntimeError, match="frozen"):
        PREPROCESSORS.register("late")(get_preprocessor("gsm8k"))


def test_skips_are_counted_by_reason_with_their_first_places():
    skipped = SkipCounter()
    for number in range(5):
        skipped.count("empty answer", f"f:{number}")
    skipped.count("hidden", "f:9")
    assert skipped.total == 6
    assert skipped.counts == {"empty answer": 5, "hidden": 1}
    assert skipped.first_origins == {"empty answer": ["f:0", "f:1", "f:2"], "hidden": ["f:9"]}


def test_counters_of_several_parts_merge_to_the_counter_of_the_whole():
    parts, whole = [SkipCounter(), SkipCounter(), SkipCounter()], SkipCounter()
    for number in range(20):
        reason = "odd" if number % 2 else "even"
        parts[number * 3 // 20].count(reason, f"f:{number}")
        whole.count(reason, f"f:{number}")
    merged = SkipCounter()
    for part in parts:
        merged.merge(SkipCounter.from_json(json.loads(json.dumps(part.to_json()))))
    assert merged.to_json() == whole.to_json()


def test_a_dataset_whose_every_row_fails_is_an_error_that_names_reasons_and_places():
    skipped = SkipCounter()
    rows = [Row(f"hella.jsonl:{n}", {"question": "q", "answer": ""}) for n in range(4)]
    examples = list(get_preprocessor("gsm8k")(rows, skipped))
    with pytest.raises(DataError) as caught:
        require_usable("gsm8k", len(examples), skipped)
    assert "4 x empty answer (first: hella.jsonl:0, hella.jsonl:1, hella.jsonl:2)" in caught.value.found


def test_a_dataset_without_rows_is_an_error_too_and_one_example_is_enough():
    with pytest.raises(DataError, match="it has no rows"):
        require_usable("gsm8k", 0, SkipCounter())
    require_usable("gsm8k", 1, SkipCounter())


def test_a_column_of_another_type_names_file_row_and_type():
    row = Row("f.jsonl:3", {"question": {"text": "q"}, "choices": "abc", "answer": "2", "flag": True})
    with pytest.raises(DataError, match=r"f\.jsonl:3: column 'question' holds dict"):
        text(row, "question")
    with pytest.raises(DataError, match="a list of texts"):
        text_list(row, "choices")
    with pytest.raises(DataError, match="a whole number"):
        integer(row, "answer")
    with pytest.raises(DataError, match="a whole number"):
        integer(row, "flag")


def test_null_and_empty_are_not_the_same_as_a_missing_column():
    row = Row("f.jsonl:1", {"a": None, "b": "", "c": " x "})
    assert column(row, "a") is None
    assert (maybe_text(row, "a"), maybe_text(row, "b"), maybe_text(row, "c")) == ("", "", " x ")
    assert text_list(row, "a") == []
    with pytest.raises(DataError, match="no column 'd'"):
        column(row, "d")


def test_ids_do_not_depend_on_the_folder_and_tell_equal_rows_apart():
    value = {"question": "q", "answer": "a"}
    assert row_id(Row("/one/rows.jsonl:1", value)) == row_id(Row("/two/rows.jsonl:1", value))
    assert row_id(Row("rows.jsonl:1", value)) != row_id(Row("rows.jsonl:2", value))


def test_equal_questions_fall_into_one_group():
    rows = [Row(f"f:{n}", {"question": " Same? ".strip(" ") + " " * n, "answer": f"#### {n}"}) for n in range(3)]
    examples = list(get_preprocessor("gsm8k")(rows, SkipCounter()))
    assert len({example.group for example in examples}) == 1
    assert len({example.id for example in examples}) == 3


def test_a_digest_tells_where_one_part_ends():
    assert digest("ab", "c") != digest("a", "bc")
    assert len(digest("a")) == 16


def test_datasets_whose_rows_belong_together_say_by_which_columns():
    assert {name: adjacent_columns(name) for name in preprocessor_names() if adjacent_columns(name)} == {
        "kjv_bible": ("Book", "Chapter"),
        "open_assistant": ("message_tree_id",),
        "wikiqa": ("question_id",),
    }


def solved(name: str, limit: int) -> str:
    """A Python program that runs the tests of each real row on its own target, each row in a scope of its own."""
    lines = (shared_data(name) / "rows.jsonl").read_text(encoding="utf-8").splitlines()[:limit]
    rows = [Row(f"{name}:{number}", json.loads(line)) for number, line in enumerate(lines)]
    programs = [
        "\n".join([example.meta["prompt"] + example.target, example.meta["setup"], *example.meta["tests"]])
        for example in get_preprocessor(name)(rows, SkipCounter())
        if example.meta["test_format"] == "python"
    ]
    return (
        f"import json\nfor source in json.loads({json.dumps(programs)!r}):\n    exec(source, {{}})\nprint('all passed')"
    )


@pytest.mark.parametrize(("name", "limit"), [("human_eval", 40), ("mbpp", 60), ("apps", 5)])
def test_the_kept_tests_pass_on_the_real_targets(name, limit, tmp_path):
    done = subprocess.run(
        [sys.executable, "-"], input=solved(name, limit), capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.stdout.endswith("all passed\n"), done.stderr[-500:]


def test_the_kept_input_and_output_pairs_pass_on_a_real_target(tmp_path):
    line = (shared_data("codecontests") / "rows.jsonl").read_text(encoding="utf-8").splitlines()[0]
    (example,) = get_preprocessor("codecontests")([Row("c:1", json.loads(line))], SkipCounter())
    pair = json.loads(example.meta["tests"][0])
    done = subprocess.run(
        [sys.executable, "-c", example.target], input=pair["input"], capture_output=True, text=True, timeout=20
    )
    assert done.stdout.split() == pair["output"].split()
